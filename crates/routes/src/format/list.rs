//! Nested lists, `[rows][layers][top_k]`.

use std::io::{self, Write};

use serde_json::Value;

use crate::format::error::FormatError;
use crate::format::signed::narrow;
use crate::rows::ExpertRows;

pub(crate) fn write(rows: &ExpertRows, out: &mut dyn Write) -> io::Result<()> {
    let [num_rows, num_layers, top_k] = rows.shape();
    let mut ids = rows.iter_ids();
    out.write_all(b"[")?;
    for row in 0..num_rows {
        out.write_all(if row > 0 { b",[" } else { b"[" })?;
        for layer in 0..num_layers {
            out.write_all(if layer > 0 { b",[" } else { b"[" })?;
            for (k, id) in ids.by_ref().take(top_k).enumerate() {
                let separator = if k > 0 { "," } else { "" };
                write!(out, "{separator}{id}")?;
            }
            out.write_all(b"]")?;
        }
        out.write_all(b"]")?;
    }
    out.write_all(b"]")
}

pub(crate) fn read(rows: &[Value], start: usize, shape: Option<[usize; 3]>) -> Result<ExpertRows, FormatError> {
    let wrong = |message: String| FormatError::new("shape", message);
    let list = |value: &Value, what: &str| match value {
        Value::Array(list) => Ok(list.clone()),
        other => Err(wrong(format!("{what} is {other}, not a list"))),
    };
    let Some(first) = rows.first() else {
        // No rows, no axes: only who asked knows them.
        let [_, num_layers, top_k] = shape.ok_or_else(|| wrong("an empty list has none; give it".into()))?;
        return narrow(start, [0, num_layers, top_k], std::iter::empty()).and_then(|rows| match num_layers * top_k {
            0 => Err(wrong("layers and experts per token are at least 1".into())),
            _ => Ok(rows),
        });
    };
    let num_layers = list(first, "row 0")?.len();
    let mut top_k = None;
    let mut ids = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let layers = list(row, &format!("row {index}"))?;
        if layers.len() != num_layers {
            return Err(wrong(format!("row {index} has {} layers, row 0 has {num_layers}", layers.len())));
        }
        for (layer, cell) in layers.iter().enumerate() {
            let cell = list(cell, &format!("row {index}, layer {layer}"))?;
            let expected = *top_k.get_or_insert(cell.len());
            if cell.len() != expected {
                return Err(wrong(format!("row {index}, layer {layer} has {} experts, not {expected}", cell.len())));
            }
            for id in &cell {
                let id = id.as_i64().ok_or_else(|| FormatError::new("data", format!("{id} is no expert id")))?;
                ids.push(id);
            }
        }
    }
    let shape = [rows.len(), num_layers, top_k.unwrap_or(0)];
    crate::format::signed::check_bytes(shape, 1, ids.len())?;
    narrow(start, shape, ids.into_iter())
}
