//! SkyRL's form, `{"data","shape","dtype"}`: the narrowest of uint8, int16 and int32 that holds the largest id.

use std::io::{self, Write};

use crate::dtype::ExpertDtype;
use crate::format::base64_text;
use crate::format::error::FormatError;
use crate::format::signed::{self, SignedDtype};
use crate::rows::ExpertRows;

pub(crate) fn write(rows: &ExpertRows, out: &mut dyn Write) -> io::Result<()> {
    let largest = rows.iter_ids().max().unwrap_or(0);
    out.write_all(br#"{"data":""#)?;
    let dtype = match (largest, rows.layout().dtype) {
        (0..=0xff, ExpertDtype::U8) => {
            base64_text::write(&[], rows.data(), out)?;
            "uint8"
        }
        (0..=0xff, ExpertDtype::U16) => {
            base64_text::write_ids(rows.iter_ids().map(|id| [id as u8]), out)?;
            "uint8"
        }
        // Within 15 bits, signed and unsigned are the same bytes.
        (..=0x7fff, _) => {
            base64_text::write(&[], rows.data(), out)?;
            "int16"
        }
        _ => {
            signed::write(SignedDtype::I32, rows.iter_ids(), out)?;
            "int32"
        }
    };
    let [n, layers, top_k] = rows.shape();
    write!(out, r#"","shape":[{n},{layers},{top_k}],"dtype":"{dtype}"}}"#)
}

pub(crate) fn read(data: &str, shape: [usize; 3], dtype: &str, start: usize) -> Result<ExpertRows, FormatError> {
    let bytes = base64_text::decode(data)?;
    if dtype == "uint8" {
        return signed::build(start, shape, ExpertDtype::U8, bytes);
    }
    let dtype = SignedDtype::from_name(dtype).filter(|dtype| matches!(dtype, SignedDtype::I16 | SignedDtype::I32));
    let dtype = dtype.ok_or_else(|| FormatError::new("dtype", "it is none of uint8, int16 and int32"))?;
    signed::read(dtype, start, shape, &bytes)
}
