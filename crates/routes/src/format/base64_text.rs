//! Base64 in a body: standard alphabet, with padding.

use std::io::{self, Write};

use base64_turbo::STANDARD;

use crate::format::error::FormatError;

/// Bytes encoded at a time: a multiple of three, so that stretches follow each other without padding, and small enough
/// to stay in the nearest cache on the way to the body.
const STRETCH: usize = 12 << 10;

/// Writes the text of `head` and `data` in sequence, as of one stretch of bytes.
pub(crate) fn write(head: &[u8], data: &[u8], out: &mut dyn Write) -> io::Result<()> {
    // The first part borrows bytes from the second until it is a multiple of three.
    let (borrowed, rest) = data.split_at(((3 - head.len() % 3) % 3).min(data.len()));
    let mut text = [0; STRETCH / 3 * 4];
    for bytes in [&[head, if head.is_empty() { &[] } else { borrowed }].concat(), rest] {
        for stretch in bytes.chunks(STRETCH) {
            write_stretch(stretch, &mut text, out)?;
        }
    }
    Ok(())
}

/// Writes the text of ids that `N` bytes are made of.
pub(crate) fn write_ids<const N: usize>(mut ids: impl Iterator<Item = [u8; N]>, out: &mut dyn Write) -> io::Result<()> {
    let (mut bytes, mut text) = ([0; STRETCH], [0; STRETCH / 3 * 4]);
    loop {
        let mut filled = 0;
        for (slot, id) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(ids.by_ref()) {
            *slot = id;
            filled += N;
        }
        if filled == 0 {
            return Ok(());
        }
        write_stretch(&bytes[..filled], &mut text, out)?;
    }
}

fn write_stretch(bytes: &[u8], text: &mut [u8], out: &mut dyn Write) -> io::Result<()> {
    let length = STANDARD.encode_slice(bytes, text).map_err(io::Error::other)?;
    out.write_all(&text[..length])
}

/// The bytes of a text.
pub(crate) fn decode(text: &str) -> Result<Vec<u8>, FormatError> {
    STANDARD.decode(text).map_err(|error| FormatError::new("data", format!("it is not base64: {error}")))
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against another implementation, over the seams between stretches.
        #[test]
        fn agrees_with_another_implementation(head in 0usize..9, len in prop_oneof![0usize..50, 12_280usize..12_300, 24_570usize..24_600]) {
            let bytes: Vec<u8> = (0..head + len).map(|i| (i * 7 + i / 251) as u8).collect();
            let expect = general_purpose::STANDARD.encode(&bytes);
            let mut text = Vec::new();
            write(&bytes[..head], &bytes[head..], &mut text).unwrap();
            prop_assert_eq!(std::str::from_utf8(&text).unwrap(), &expect);
            let mut text = Vec::new();
            write_ids(bytes.iter().map(|byte| [*byte, 0, 0, 0]), &mut text).unwrap();
            let wide: Vec<u8> = bytes.iter().flat_map(|byte| [*byte, 0, 0, 0]).collect();
            prop_assert_eq!(std::str::from_utf8(&text).unwrap(), general_purpose::STANDARD.encode(wide));
            prop_assert_eq!(decode(&expect).unwrap(), bytes);
        }
    }
}
