//! The encodings of rows that clients know: written straight into a body, and read with every doubt refused.
//!
//! | format | payload |
//! |---|---|
//! | [`Object`](Format::Object) | `{"data":b64,"shape":[rows,L,K],"start":s,"dtype":"uint8"}` (PrimeIntellect's router, prime-rl, Dynamo) |
//! | [`Npy`](Format::Npy) | base64 of a whole `.npy` file (vLLM) |
//! | [`Sglang`](Format::Sglang) | base64 of flat int32 (SGLang, slime, miles) |
//! | [`List`](Format::List) | nested lists (lmdeploy) |
//! | [`Nemo`](Format::Nemo) | `nrlre1:<dtype>:SxLxK:b64`, one made-up row at the end (NeMo-RL) |
//! | [`Skyrl`](Format::Skyrl) | `{"data","shape","dtype"}` in the narrowest signed dtype (SkyRL) |

mod base64_text;
mod error;
mod import;
mod list;
mod nemo;
mod npy;
mod object;
mod sglang;
mod signed;
mod skyrl;

pub use error::FormatError;
pub use import::Import;
pub use object::ObjectFields;

use std::io::{self, Write};

use crate::rows::ExpertRows;

/// An encoding of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// `{"data","shape","start","dtype"}`.
    Object,
    /// Base64 of a `.npy` file.
    Npy,
    /// Base64 of flat int32.
    Sglang,
    /// Nested lists.
    List,
    /// `nrlre1:…`.
    Nemo,
    /// `{"data","shape","dtype"}`.
    Skyrl,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Object, Self::Npy, Self::Sglang, Self::List, Self::Nemo, Self::Skyrl];

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Its name in requests and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Object => "object",
            Self::Npy => "npy",
            Self::Sglang => "sglang",
            Self::List => "list",
            Self::Nemo => "nemo",
            Self::Skyrl => "skyrl",
        }
    }

    /// Whether a payload says where its rows start; otherwise the start is sent beside it.
    pub fn has_start(self) -> bool {
        matches!(self, Self::Object)
    }

    /// Whether rows that begin at `start` can be written.
    ///
    /// # Errors
    /// [`FormatError`] for [`Format::Nemo`] unless `start` is 0.
    pub fn check_start(self, start: usize) -> Result<(), FormatError> {
        if self == Self::Nemo { nemo::check(start) } else { Ok(()) }
    }

    /// Writes the payload as compact JSON; the rows are encoded on their way to `out`, without a copy in between.
    ///
    /// `num_experts` decides the dtype of [`Format::Nemo`] and of nothing else.
    ///
    /// # Errors
    /// What `out` reports, and a start that [`check_start`](Self::check_start) refuses.
    pub fn write_json(self, rows: &ExpertRows, num_experts: usize, out: &mut dyn Write) -> io::Result<()> {
        self.check_start(rows.start()).map_err(io::Error::other)?;
        match self {
            Self::Object => object::write(rows, out),
            Self::Npy => npy::write(rows, out),
            Self::Sglang => sglang::write(rows, out),
            Self::List => list::write(rows, out),
            Self::Nemo => nemo::write(rows, num_experts, out),
            Self::Skyrl => skyrl::write(rows, out),
        }
    }

    /// The payload as compact JSON.
    ///
    /// # Errors
    /// As [`check_start`](Self::check_start).
    pub fn to_json(self, rows: &ExpertRows, num_experts: usize) -> Result<String, FormatError> {
        self.check_start(rows.start())?;
        let mut out = Vec::with_capacity(rows.data().len().div_ceil(3) * 4 + 200);
        self.write_json(rows, num_experts, &mut out).expect("writing to memory does not fail");
        Ok(String::from_utf8(out).expect("base64, digits and brackets are text"))
    }
}

/// Reads `ROWSxLAYERSxTOP_K`.
pub fn parse_shape(text: &str) -> Option<[usize; 3]> {
    let axes: Vec<usize> = text.split('x').map(|axis| axis.parse().ok()).collect::<Option<_>>()?;
    axes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::dtype::ExpertDtype;
    use crate::layout::RowLayout;

    prop_compose! {
        fn any_rows()(
            start in prop_oneof![Just(0usize), 1usize..1000], num_rows in 0usize..9, num_layers in 1usize..4, top_k in 1usize..4,
            largest in prop_oneof![Just(127u16), Just(255), Just(300), Just(40_000), Just(u16::MAX)], seed: u64,
        ) -> ExpertRows {
            let dtype = ExpertDtype::for_largest_id(largest);
            let id = |i: u64| (seed.wrapping_mul(i * 2 + 1) >> 40) as u16 % largest + u16::from(i == 0);
            let ids = (0..(num_rows * num_layers * top_k) as u64).map(|i| if i == 1 { largest } else { id(i) });
            let data = match dtype {
                ExpertDtype::U8 => ids.map(|id| id as u8).collect(),
                ExpertDtype::U16 => ids.flat_map(u16::to_le_bytes).collect(),
            };
            ExpertRows::new(start, RowLayout { num_layers, top_k, dtype }, data).unwrap()
        }
    }

    proptest! {
        /// What is written is read back, whatever the format.
        #[test]
        fn every_format_comes_back(rows in any_rows()) {
            for format in Format::ALL {
                let json = match format.to_json(&rows, 1 << 16) {
                    Ok(json) => json,
                    Err(error) => {
                        prop_assert_eq!((format, error.field()), (Format::Nemo, "start"));
                        prop_assert!(rows.start() > 0);
                        continue;
                    }
                };
                let value: Value = serde_json::from_str(&json).unwrap();
                prop_assert_eq!(&value.to_string(), &json, "the JSON is compact");
                let hints = Import {
                    start: Some(rows.start()), shape: Some(rows.shape()), format: Some(format), ..Import::default()
                };
                let back = hints.read(&value).unwrap().unwrap();
                prop_assert_eq!((back.start(), back.shape()), (rows.start(), rows.shape()));
                prop_assert!(back.iter_ids().eq(rows.iter_ids()));
                if matches!(format, Format::Object | Format::Npy) {
                    prop_assert_eq!(&back, &rows, "the dtype is kept");
                }
                // Every format but the object's look-alike is recognised by itself.
                let guessed = Import { format: None, bare_skyrl: true, ..hints }.read(&value).unwrap().unwrap();
                prop_assert_eq!(guessed, back);
            }
        }

        /// No input is worth a panic.
        #[test]
        fn no_text_is_worth_a_panic(text in "\\PC{0,60}", prefix in prop::sample::select(vec![
            "", "nrlre1:", "nrlre1:int8:1x1x1:", "k05VTVBZ", "k05VTVBZAQB2AHsnZGVzY3InOiAnfHUx",
        ])) {
            let value = Value::String(format!("{prefix}{text}"));
            for shape in [None, Some([1, 1, 1]), Some([usize::MAX; 3])] {
                let _ = Import { shape, ..Import::default() }.read(&value);
            }
        }
    }
}
