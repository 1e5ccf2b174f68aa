use candle_core::Tensor;

/// Hidden rows `[rows, hidden]` after the final norm, where they were computed.
#[derive(Debug)]
pub struct Hidden(pub(crate) Place);

#[derive(Debug)]
pub(crate) enum Place {
    /// F32.
    Host(Tensor),
}

impl Hidden {
    /// Number of rows.
    pub fn len(&self) -> usize {
        match &self.0 {
            Place::Host(rows) => rows.dim(0).unwrap_or(0),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
