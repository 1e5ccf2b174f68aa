//! SGLang's form: base64 of flat int32; shape and start are known elsewhere.

use crate::format::base64_text;
use std::io::{self, Write};

use crate::format::error::FormatError;
use crate::format::signed::{self, SignedDtype};
use crate::rows::ExpertRows;

pub(crate) fn write(rows: &ExpertRows, out: &mut dyn Write) -> io::Result<()> {
    out.write_all(b"\"")?;
    signed::write(SignedDtype::I32, rows.iter_ids(), out)?;
    out.write_all(b"\"")
}

pub(crate) fn read(text: &str, start: usize, shape: Option<[usize; 3]>) -> Result<ExpertRows, FormatError> {
    let shape = shape.ok_or_else(|| FormatError::new("shape", "flat int32 has none; give it as ROWSxLAYERSxTOP_K"))?;
    signed::read(SignedDtype::I32, start, shape, &base64_text::decode(text)?)
}
