use std::str::FromStr;

use crate::gpu::{Gpu, GpuError, cuda};

/// `--device`: where a model is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first NVIDIA GPU, or the CPU where there is none.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU of this index.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let index = |index: &str| index.parse().map(Self::Cuda);
        let parsed = match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            other => other.strip_prefix("cuda:").map_or_else(|| index("none"), index),
        };
        parsed.map_err(|_| format!("expected auto, cpu, cuda or cuda:N, found {text:?}"))
    }
}

impl DeviceChoice {
    /// The GPU that was chosen, `None` for the CPU.
    ///
    /// # Errors
    /// [`GpuError`] if a GPU was named that cannot be had; `auto` then says why and takes the CPU.
    pub fn open(self) -> Result<Option<Gpu>, GpuError> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(index) => cuda::open(index).map(Some),
            Self::Auto if !cfg!(feature = "cuda") => Ok(None),
            Self::Auto => Ok(cuda::open(0).inspect_err(|error| eprintln!("{error}: using the CPU")).ok()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read() {
        for (text, choice) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:3", DeviceChoice::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(choice));
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "metal"] {
            assert!(text.parse::<DeviceChoice>().is_err_and(|message| message.contains("cuda:N")), "{text}");
        }
    }
}
