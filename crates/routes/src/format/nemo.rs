//! NeMo-RL's envelope, `nrlre1:<int8|int16|int32>:SxLxK:<base64>`: one row for every token, so the last token, which
//! was never forwarded, has a made-up one, `0..K-1`.

use std::io::{self, Write};

use crate::format::base64_text;
use crate::format::error::FormatError;
use crate::format::parse_shape;
use crate::format::signed::{self, SignedDtype, check_bytes};
use crate::rows::ExpertRows;

pub(crate) const PREFIX: &str = "nrlre1:";

/// Refuses rows that do not begin at 0, which the form cannot say.
pub(crate) fn check(start: usize) -> Result<(), FormatError> {
    match start {
        0 => Ok(()),
        _ => Err(FormatError::new("start", format!("it is {start}; the form has none, its rows begin at 0"))),
    }
}

pub(crate) fn write(rows: &ExpertRows, num_experts: usize, out: &mut dyn Write) -> io::Result<()> {
    let [n, layers, top_k] = rows.shape();
    let largest = rows.iter_ids().map(usize::from).max().unwrap_or(0).max(num_experts.saturating_sub(1));
    let (name, dtype) = match largest {
        0..=0x7f => ("int8", SignedDtype::I8),
        0x80..=0x7fff => ("int16", SignedDtype::I16),
        _ => ("int32", SignedDtype::I32),
    };
    let made_up = (0..layers).flat_map(|_| (0..top_k).map(|k| k as u16));
    write!(out, "\"{PREFIX}{name}:{}x{layers}x{top_k}:", n + 1)?;
    if dtype.itemsize() == rows.layout().dtype.itemsize() {
        // The bytes are the same: what is left of whole triples goes with the made-up row.
        let (triples, rest) = rows.data().split_at(rows.data().len() / 3 * 3);
        let made_up = made_up.flat_map(|id| id.to_le_bytes().into_iter().take(dtype.itemsize()));
        base64_text::write(&[], triples, out)?;
        base64_text::write(&[], &rest.iter().copied().chain(made_up).collect::<Vec<u8>>(), out)?;
    } else {
        signed::write(dtype, rows.iter_ids().chain(made_up), out)?;
    }
    out.write_all(b"\"")
}

pub(crate) fn read(text: &str) -> Result<ExpertRows, FormatError> {
    let wrong = |message: &str| FormatError::new("format", format!("{message}; it is nrlre1:<dtype>:SxLxK:<base64>"));
    let rest = text.strip_prefix(PREFIX).ok_or_else(|| wrong("the prefix is missing"))?;
    let mut parts = rest.splitn(3, ':');
    let (Some(name), Some(shape), Some(data)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(wrong("a part is missing"));
    };
    let dtype = SignedDtype::from_name(name).filter(|dtype| *dtype != SignedDtype::I64);
    let dtype = dtype.ok_or_else(|| FormatError::new("dtype", format!("it is {name:?}; int8, int16 or int32")))?;
    let shape = parse_shape(shape).ok_or_else(|| FormatError::new("shape", format!("it is {shape:?}, not SxLxK")))?;
    let [tokens, layers, top_k] = shape;
    if tokens == 0 {
        return Err(FormatError::new("shape", "it has no token, so not even the made-up last row"));
    }
    let bytes = base64_text::decode(data)?;
    check_bytes(shape, dtype.itemsize(), bytes.len())?;
    let kept = (tokens - 1) * layers * top_k * dtype.itemsize();
    signed::read(dtype, 0, [tokens - 1, layers, top_k], &bytes[..kept])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::ExpertDtype;
    use crate::layout::RowLayout;

    #[test]
    fn the_last_row_is_made_up_and_goes_again() {
        let layout = RowLayout { num_layers: 1, top_k: 2, dtype: ExpertDtype::U8 };
        let rows = ExpertRows::new(0, layout, vec![5, 3]).unwrap();
        let written = |num_experts| {
            let mut out = Vec::new();
            write(&rows, num_experts, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(written(128), r#""nrlre1:int8:2x1x2:BQMAAQ==""#);
        assert!(written(129).starts_with("\"nrlre1:int16:2x1x2:"));
        assert!(written(40_000).starts_with("\"nrlre1:int32:2x1x2:"));
        assert_eq!(read("nrlre1:int8:2x1x2:BQMAAQ==").unwrap(), rows);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expect) in [
            ("nrlre1:int8", "format: a part is missing"),
            ("nrlre1:uint8:1x1x1:AA==", "dtype: it is \"uint8\""),
            ("nrlre1:int8:1x1:AA==", "shape: it is \"1x1\""),
            ("nrlre1:int8:0x1x1:", "shape: it has no token"),
            ("nrlre1:int8:2x1x1:AA==", "data: it has 1 bytes"),
            ("nrlre1:int8:2x1x1:/wA=", "data: -1 is no expert id"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        }
    }
}
