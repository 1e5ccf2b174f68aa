//! Nested lists, `[rows][layers][top_k]`.

use std::io::{self, Write};

use serde_json::Value;

use crate::format::error::FormatError;
use crate::format::signed::narrow;
use crate::rows::ExpertRows;

pub(crate) fn write(rows: &ExpertRows, out: &mut dyn Write) -> io::Result<()> {
    let [num_rows, num_layers, top_k] = rows.shape();
    let (mut ids, mut digits, mut text) = (rows.iter_ids(), itoa::Buffer::new(), Vec::new());
    out.write_all(b"[")?;
    for row in 0..num_rows {
        text.clear();
        text.extend_from_slice(if row > 0 { b",[" } else { b"[" });
        for layer in 0..num_layers {
            text.extend_from_slice(if layer > 0 { b",[" } else { b"[" });
            for (k, id) in ids.by_ref().take(top_k).enumerate() {
                text.extend_from_slice(if k > 0 { b"," } else { b"" });
                text.extend_from_slice(digits.format(id).as_bytes());
            }
            text.push(b']');
        }
        text.push(b']');
        out.write_all(&text)?;
    }
    out.write_all(b"]")
}

fn wrong(message: String) -> FormatError {
    FormatError::new("shape", message)
}

/// The elements of a list that `what` names in an error.
fn elements(value: &Value, what: impl FnOnce() -> String) -> Result<&[Value], FormatError> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| wrong(format!("{} is {value}, not a list", what())))
}

pub(crate) fn read(rows: &[Value], start: usize, shape: Option<[usize; 3]>) -> Result<ExpertRows, FormatError> {
    let Some(first) = rows.first() else {
        // No rows, no axes: only who asked knows them.
        let [_, num_layers, top_k] = shape.ok_or_else(|| wrong("an empty list has none; give it".into()))?;
        return narrow(start, [0, num_layers, top_k], std::iter::empty());
    };
    let num_layers = elements(first, || "row 0".into())?.len();
    let mut top_k = None;
    let mut ids = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let layers = elements(row, || format!("row {index}"))?;
        if layers.len() != num_layers {
            return Err(wrong(format!("row {index} has {} layers, row 0 has {num_layers}", layers.len())));
        }
        for (layer, cell) in layers.iter().enumerate() {
            let cell = elements(cell, || format!("row {index}, layer {layer}"))?;
            let expected = *top_k.get_or_insert(cell.len());
            if cell.len() != expected {
                return Err(wrong(format!("row {index}, layer {layer} has {} experts, not {expected}", cell.len())));
            }
            for id in cell {
                let id = id.as_i64().ok_or_else(|| FormatError::new("data", format!("{id} is no expert id")))?;
                ids.push(id);
            }
        }
    }
    let shape = [rows.len(), num_layers, top_k.unwrap_or(0)];
    crate::format::signed::check_bytes(shape, 1, ids.len())?;
    narrow(start, shape, ids.iter().copied())
}
