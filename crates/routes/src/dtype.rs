//! The width of an expert id.

/// The dtype of expert ids: fixed by the model, never by the ids that happen to occur.
///
/// A dtype chosen from the largest id of a payload makes deltas of one conversation differ in width,
/// which has corrupted trainers that pack them together (prime-rl#2487).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExpertDtype {
    /// One byte an id.
    U8,
    /// Two bytes an id, little-endian.
    U16,
}

impl ExpertDtype {
    /// The dtype of a model with `num_experts` routed experts: `uint8` up to 256 of them.
    pub fn for_num_experts(num_experts: usize) -> Self {
        if num_experts <= 256 { Self::U8 } else { Self::U16 }
    }

    /// The narrowest that holds `id`; for rows that come without the model's dtype.
    pub fn for_largest_id(id: u16) -> Self {
        if id <= u16::from(u8::MAX) { Self::U8 } else { Self::U16 }
    }

    /// The wider of two.
    pub fn wider(self, other: Self) -> Self {
        if self == other { self } else { Self::U16 }
    }

    /// Reads the NumPy name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "uint8" => Some(Self::U8),
            "uint16" => Some(Self::U16),
            _ => None,
        }
    }

    /// Bytes an id.
    pub fn itemsize(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
        }
    }

    /// The NumPy name, as on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "uint8",
            Self::U16 => "uint16",
        }
    }

    /// The NumPy array-protocol descriptor, as in a `.npy` header.
    pub fn npy_descr(self) -> &'static str {
        match self {
            Self::U8 => "|u1",
            Self::U16 => "<u2",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depends_on_the_number_of_experts_alone() {
        for (num_experts, expect) in [(1, "uint8"), (256, "uint8"), (257, "uint16"), (512, "uint16")] {
            assert_eq!(ExpertDtype::for_num_experts(num_experts).name(), expect);
        }
    }
}
