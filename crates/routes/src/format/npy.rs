//! The `.npy` form that vLLM returns: base64 of a whole file.

use std::io::{self, Write};

use crate::dtype::ExpertDtype;
use crate::format::base64_text;
use crate::format::error::FormatError;
use crate::format::signed::{self, SignedDtype};
use crate::rows::ExpertRows;

const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// Base64 of the magic: how a file is told from flat bytes.
pub(crate) const TEXT_PREFIX: &str = "k05VTVBZ";

/// Base64 of a version 1.0 `.npy` file holding the rows, `[rows, num_layers, top_k]`, C order.
///
/// ```text
/// \x93NUMPY  01 00  <u16 header length>  {'descr': '|u1', 'fortran_order': False, 'shape': (2, 3, 4), }<spaces>\n  data
/// ```
/// The header is padded so that the data begins at a multiple of 64 bytes (numpy.lib.format).
pub(crate) fn write(rows: &ExpertRows, out: &mut dyn Write) -> io::Result<()> {
    let [n, layers, top_k] = rows.shape();
    let descr = rows.layout().dtype.npy_descr();
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({n}, {layers}, {top_k}), }}");
    let unpadded = MAGIC.len() + 4 + header.len() + 1;
    header.push_str(&" ".repeat(unpadded.next_multiple_of(64) - unpadded));
    header.push('\n');

    let mut head = MAGIC.to_vec();
    head.extend([1, 0]);
    // Three axes of 20 digits fit easily: the length stays below 256.
    head.extend((header.len() as u16).to_le_bytes());
    head.extend(header.as_bytes());
    out.write_all(b"\"")?;
    base64_text::write(&head, rows.data(), out)?;
    out.write_all(b"\"")
}

/// Ids of a file.
enum Ids {
    Unsigned(ExpertDtype),
    Signed(SignedDtype),
}

pub(crate) fn read(text: &str, start: usize) -> Result<ExpertRows, FormatError> {
    let mut file = base64_text::decode(text)?;
    let wrong = |message: &str| FormatError::new("data", format!("it is no .npy file: {message}"));
    let header_start = match file.get(..8) {
        Some([b'\x93', b'N', b'U', b'M', b'P', b'Y', 1, _]) => 10,
        Some([b'\x93', b'N', b'U', b'M', b'P', b'Y', 2 | 3, _]) => 12,
        _ => return Err(wrong("the magic or the version is wrong")),
    };
    let length = file.get(8..header_start).ok_or_else(|| wrong("it ends within the header"))?;
    let length = length.iter().rev().fold(0usize, |length, byte| length << 8 | usize::from(*byte));
    let header = file.get(header_start..).and_then(|rest| rest.get(..length));
    let header =
        header.and_then(|header| std::str::from_utf8(header).ok()).ok_or_else(|| wrong("the header is cut"))?;
    let descr = quoted(value_of(header, "descr").ok_or_else(|| wrong("descr is missing"))?);
    let descr = descr.ok_or_else(|| wrong("descr is no string"))?;
    let dtype = match descr.trim_start_matches(['|', '<', '=']) {
        "u1" => Ids::Unsigned(ExpertDtype::U8),
        "u2" => Ids::Unsigned(ExpertDtype::U16),
        "i1" => Ids::Signed(SignedDtype::I8),
        "i2" => Ids::Signed(SignedDtype::I16),
        "i4" => Ids::Signed(SignedDtype::I32),
        "i8" => Ids::Signed(SignedDtype::I64),
        _ => return Err(FormatError::new("dtype", format!("it is {descr:?}; little-endian integers are read"))),
    };
    let order = value_of(header, "fortran_order").ok_or_else(|| wrong("fortran_order is missing"))?;
    if !order.starts_with("False") {
        return Err(wrong("the array is not in C order"));
    }
    let shape = value_of(header, "shape").and_then(tuple).ok_or_else(|| wrong("the shape is no tuple of numbers"))?;
    let shape: [usize; 3] = shape
        .try_into()
        .map_err(|shape| FormatError::new("shape", format!("it is {shape:?}; it has the axes rows, layers, top_k")))?;
    let data = file.split_off(header_start + length);
    match dtype {
        Ids::Unsigned(dtype) => signed::build(start, shape, dtype, data),
        Ids::Signed(dtype) => signed::read(dtype, start, shape, &data),
    }
}

/// What follows a key of the header, a Python dictionary of three plain entries.
fn value_of<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    let after_key = ['\'', '"'].iter().find_map(|quote| header.split_once(&format!("{quote}{key}{quote}")))?.1;
    Some(after_key.trim_start().strip_prefix(':')?.trim_start())
}

fn quoted(value: &str) -> Option<&str> {
    let quote = value.chars().next().filter(|quote| matches!(quote, '\'' | '"'))?;
    value[1..].split_once(quote).map(|(text, _)| text)
}

fn tuple(value: &str) -> Option<Vec<usize>> {
    let (inside, _) = value.strip_prefix('(')?.split_once(')')?;
    inside.split(',').map(str::trim).filter(|axis| !axis.is_empty()).map(|axis| axis.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;

    use super::*;
    use crate::layout::RowLayout;

    /// Reads a file back by the published format, independent of the writer above.
    fn parts(text: &str) -> (String, Vec<u8>) {
        let file = STANDARD.decode(text).unwrap();
        assert_eq!(&file[..8], b"\x93NUMPY\x01\x00");
        let header_len = usize::from(u16::from_le_bytes([file[8], file[9]]));
        assert_eq!((10 + header_len) % 64, 0);
        (String::from_utf8(file[10..10 + header_len].to_vec()).unwrap(), file[10 + header_len..].to_vec())
    }

    #[test]
    fn header_and_data_come_back() {
        for n in 0..8usize {
            for (dtype, descr) in [(ExpertDtype::U8, "|u1"), (ExpertDtype::U16, "<u2")] {
                let layout = RowLayout { num_layers: 3, top_k: 1, dtype };
                let data: Vec<u8> = (0..n * layout.row_bytes()).map(|i| i as u8).collect();
                let rows = ExpertRows::new(0, layout, data.clone()).unwrap();
                let mut out = Vec::new();
                write(&rows, &mut out).unwrap();
                let text = String::from_utf8(out).unwrap();
                let (header, payload) = parts(text.trim_matches('"'));
                let expect = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({n}, 3, 1), }}");
                assert_eq!(header.trim_end(), expect);
                assert!(header.ends_with('\n'));
                assert_eq!(payload, data);
            }
        }
    }

    fn file(version: u8, header: &str, data: &[u8]) -> String {
        let mut file = [&MAGIC[..], &[version, 0]].concat();
        match version {
            1 => file.extend((header.len() as u16).to_le_bytes()),
            _ => file.extend((header.len() as u32).to_le_bytes()),
        }
        file.extend(header.as_bytes());
        file.extend(data);
        STANDARD.encode(file)
    }

    #[test]
    fn files_of_others_are_read() {
        let spaced = r#"{"descr" : "<i4" ,"fortran_order":False, "shape": (1,1 , 2,)}"#;
        let rows = read(&file(2, spaced, &[7, 0, 0, 0, 44, 1, 0, 0]), 5).unwrap();
        assert_eq!((rows.start(), rows.ids(5, 0)), (5, Some(vec![7, 300])));
        let header = |descr: &str, order: &str, shape: &str| {
            format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}")
        };
        for (header, expect) in [
            (header("|u1", "True", "(1, 1, 2)"), "not in C order"),
            (header(">u2", "False", "(1, 1, 1)"), "dtype: it is \">u2\""),
            (header("<f4", "False", "(1, 1, 1)"), "dtype: it is \"<f4\""),
            (header("|u1", "False", "(1, 2)"), "shape: it is [1, 2]"),
            (header("|u1", "False", "(9, 1, 2)"), "data: it has 2 bytes"),
            (header("|u1", "False", "(-1, 1, 2)"), "no tuple of numbers"),
            ("{}".into(), "descr is missing"),
        ] {
            let error = read(&file(1, &header, &[1, 2]), 0).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        }
        assert!(read(TEXT_PREFIX, 0).is_err());
    }
}
