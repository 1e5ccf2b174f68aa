//! Values written the way Python writes them: `json.dumps` and `repr`, which templates were made for.

use std::fmt::Write as _;

use serde_json::{Number, Value};

/// The options of `json.dumps` that Hugging Face's `tojson` filter offers.
#[derive(Debug, Clone)]
pub(crate) struct JsonStyle {
    /// Escape everything beyond ASCII.
    pub(crate) ensure_ascii: bool,
    /// One item per line, indented by this text.
    pub(crate) indent: Option<String>,
    pub(crate) item_separator: String,
    pub(crate) key_separator: String,
    pub(crate) sort_keys: bool,
}

impl JsonStyle {
    /// Python's defaults, which drop the space after a comma when indenting.
    pub(crate) fn new(indent: Option<String>) -> Self {
        let item_separator = if indent.is_some() { "," } else { ", " };
        Self {
            ensure_ascii: false,
            indent,
            item_separator: item_separator.into(),
            key_separator: ": ".into(),
            sort_keys: false,
        }
    }
}

/// `json.dumps(value, …)`.
pub(crate) fn json_dumps(value: &Value, style: &JsonStyle) -> String {
    let mut out = String::new();
    write_json(&mut out, value, style, 0);
    out
}

fn write_json(out: &mut String, value: &Value, style: &JsonStyle, depth: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
        Value::Number(number) => out.push_str(&python_number(number)),
        Value::String(text) => write_json_string(out, text, style.ensure_ascii),
        Value::Array(items) => {
            write_items(out, style, depth, ('[', ']'), items.iter(), |out, item| {
                write_json(out, item, style, depth + 1);
            });
        }
        Value::Object(fields) => {
            let mut pairs: Vec<_> = fields.iter().collect();
            if style.sort_keys {
                pairs.sort_by_key(|(key, _)| key.as_str());
            }
            write_items(out, style, depth, ('{', '}'), pairs.into_iter(), |out, (key, item)| {
                write_json_string(out, key, style.ensure_ascii);
                out.push_str(&style.key_separator);
                write_json(out, item, style, depth + 1);
            });
        }
    }
}

fn write_items<T>(
    out: &mut String,
    style: &JsonStyle,
    depth: usize,
    (open, close): (char, char),
    items: impl ExactSizeIterator<Item = T>,
    mut write: impl FnMut(&mut String, T),
) {
    let empty = items.len() == 0;
    let new_line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    };
    out.push(open);
    for (index, item) in items.enumerate() {
        if index > 0 {
            out.push_str(&style.item_separator);
        }
        new_line(out, depth + 1);
        write(out, item);
    }
    if !empty {
        new_line(out, depth);
    }
    out.push(close);
}

fn write_json_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ensure_ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a String cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// `repr(value)`: what `{{ value }}` prints for a list or a dict.
pub(crate) fn repr(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Number(number) => python_number(number),
        Value::String(text) => repr_string(text),
        Value::Array(items) => format!("[{}]", items.iter().map(repr).collect::<Vec<_>>().join(", ")),
        Value::Object(fields) => {
            let pairs: Vec<_> =
                fields.iter().map(|(key, item)| format!("{}: {}", repr_string(key), repr(item))).collect();
            format!("{{{}}}", pairs.join(", "))
        }
    }
}

/// Python prefers single quotes unless the text has some and no double ones.
fn repr_string(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c < ' ' || c == '\u{7f}' => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// Python and Rust agree on digits and on when an exponent is used, not on how it is spelled.
fn python_number(number: &Number) -> String {
    if !number.is_f64() {
        return number.to_string();
    }
    let text = format!("{:?}", number.as_f64().unwrap_or(f64::NAN));
    match text.split_once('e') {
        Some((mantissa, exponent)) => match exponent.strip_prefix('-') {
            Some(digits) => format!("{mantissa}e-{digits:0>2}"),
            None => format!("{mantissa}e+{exponent:0>2}"),
        },
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_is_spelled_as_python_spells_it() {
        let value = json!({"b": [1, 2.0, 1e16, 1e-7], "a": "é\u{1}<'>", "e": [], "o": {}});
        let mut style = JsonStyle::new(None);
        assert_eq!(json_dumps(&value, &style), r#"{"b": [1, 2.0, 1e+16, 1e-07], "a": "é\u0001<'>", "e": [], "o": {}}"#);
        style.ensure_ascii = true;
        style.sort_keys = true;
        assert!(json_dumps(&value, &style).starts_with(r#"{"a": "\u00e9\u0001<'>""#));
        let indented = json_dumps(&json!({"a": [1], "o": {}}), &JsonStyle::new(Some("  ".into())));
        assert_eq!(indented, "{\n  \"a\": [\n    1\n  ],\n  \"o\": {}\n}");
    }

    #[test]
    fn repr_is_spelled_as_python_spells_it() {
        let value = json!({"a": [true, null, "it's", "\"'\n"]});
        assert_eq!(repr(&value), r#"{'a': [True, None, "it's", '"\'\n']}"#);
    }
}
