//! The template environment: Jinja as Hugging Face sets it up.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, Output, State};

use crate::error::ChatError;
use crate::python::{self, JsonStyle};
use crate::strftime;

/// Marks an error as the template's own `raise_exception`.
const RAISED: &str = "raise_exception: ";

/// An environment with the filters, functions and whitespace rules that chat templates are written for.
pub(crate) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the default delimiters are a valid syntax"));
    // Prompts are no HTML, whatever the template is called.
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(print_as_python);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: &Value| python_text(value));
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    environment.add_function("strftime_now", |format: String| strftime::now(&format));
    environment
}

/// Replaces `{% generation %}`, a block without effect on the text, by one that every Jinja knows.
pub(crate) fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|at| start + at + 2) else { break };
        let tag = &rest[start..end];
        out.push_str(&rest[..start]);
        let name = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim();
        match name {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// Tells the template's own refusals from its failures.
pub(crate) fn render_error(error: &Error) -> ChatError {
    match error.detail().and_then(|detail| detail.strip_prefix(RAISED)) {
        Some(message) => ChatError::Raised(message.to_owned()),
        None => ChatError::Render(error.to_string()),
    }
}

fn print_as_python(out: &mut Output, _state: &mut State, value: &Value) -> Result<(), Error> {
    if value.is_undefined() {
        return Ok(());
    }
    out.write_str(&python_text(value)?).map_err(Error::from)
}

/// `str(value)`.
fn python_text(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    if value.is_undefined() {
        return Ok(String::new());
    }
    // Functions, macros and modules have no JSON form; their own display is as good as any.
    Ok(to_plain(value).map_or_else(|_| value.to_string(), |plain| python::repr(&plain)))
}

/// Hugging Face's `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent = match options.get::<Option<Value>>("indent")? {
        None => None,
        Some(value) if value.is_none() => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(value)?),
        }),
    };
    let mut style = JsonStyle::new(indent);
    style.ensure_ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    style.sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    if let Some((item, key)) = separators(&options)? {
        (style.item_separator, style.key_separator) = (item, key);
    }
    options.assert_all_used()?;
    Ok(Value::from(python::json_dumps(&to_plain(value)?, &style)))
}

fn separators(options: &Kwargs) -> Result<Option<(String, String)>, Error> {
    let Some(pair) = options.get::<Option<Value>>("separators")?.filter(|pair| !pair.is_none()) else {
        return Ok(None);
    };
    Ok(Some((pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string())))
}

fn to_plain(value: &Value) -> Result<serde_json::Value, Error> {
    serde_json::to_value(value).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}
