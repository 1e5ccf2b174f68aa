//! The `.npy` form that vLLM returns: base64 of a whole file.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::rows::ExpertRows;

/// Base64 of a version 1.0 `.npy` file holding the rows, `[rows, num_layers, top_k]`, C order.
///
/// ```text
/// \x93NUMPY  01 00  <u16 header length>  {'descr': '|u1', 'fortran_order': False, 'shape': (2, 3, 4), }<spaces>\n  data
/// ```
/// The header is padded so that the data begins at a multiple of 64 bytes (numpy.lib.format).
/// The form has no start: send it beside as `routed_experts_start`.
pub fn npy_base64(rows: &ExpertRows) -> String {
    let [n, layers, top_k] = rows.shape();
    let descr = rows.layout().dtype.npy_descr();
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({n}, {layers}, {top_k}), }}");
    let unpadded = MAGIC.len() + 2 + header.len() + 1;
    header.push_str(&" ".repeat(unpadded.next_multiple_of(64) - unpadded));
    header.push('\n');

    let mut prefix = MAGIC.to_vec();
    // Three axes of 20 digits fit easily: the length stays below 256.
    prefix.extend((header.len() as u16).to_le_bytes());
    prefix.extend(header.as_bytes());

    // Encoding in two parts would need the prefix to be a multiple of 3 bytes; pull data bytes over until it is.
    let (borrowed, rest) = rows.data().split_at(((3 - prefix.len() % 3) % 3).min(rows.data().len()));
    prefix.extend(borrowed);
    let mut text = String::with_capacity((prefix.len() + rest.len()).div_ceil(3) * 4);
    STANDARD.encode_string(&prefix, &mut text);
    if !rest.is_empty() {
        STANDARD.encode_string(rest, &mut text);
    }
    text
}

const MAGIC: &[u8; 8] = b"\x93NUMPY\x01\x00";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::ExpertDtype;
    use crate::layout::RowLayout;

    /// Reads a file back by the published format, independent of the writer above.
    fn read(text: &str) -> (String, Vec<u8>) {
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
                let (header, payload) = read(&npy_base64(&rows));
                let expect = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({n}, 3, 1), }}");
                assert_eq!(header.trim_end(), expect);
                assert!(header.ends_with('\n'));
                assert_eq!(payload, data);
            }
        }
    }
}
