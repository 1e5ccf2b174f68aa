//! SGLang's form: base64 of flat int32; shape and start are known elsewhere.

use crate::format::base64_text;
use std::io::{self, Write};

use crate::format::error::FormatError;
use crate::format::signed::{SignedDtype, check_bytes, ids, narrow};
use crate::rows::ExpertRows;

pub(crate) fn write(rows: &ExpertRows, out: &mut dyn Write) -> io::Result<()> {
    out.write_all(b"\"")?;
    base64_text::write_ids(rows.iter_ids().map(|id| u32::from(id).to_le_bytes()), out)?;
    out.write_all(b"\"")
}

pub(crate) fn read(text: &str, start: usize, shape: Option<[usize; 3]>) -> Result<ExpertRows, FormatError> {
    let shape = shape.ok_or_else(|| FormatError::new("shape", "flat int32 has none; give it as ROWSxLAYERSxTOP_K"))?;
    let bytes = base64_text::decode(text)?;
    check_bytes(shape, 4, bytes.len())?;
    narrow(start, shape, ids(SignedDtype::I32, &bytes))
}
