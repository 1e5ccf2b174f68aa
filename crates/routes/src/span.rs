//! Ranges of absolute token positions.

/// The absolute positions `[start, end)`; empty if `end <= start` was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TokenSpan {
    /// First position.
    pub start: usize,
    /// One past the last position.
    pub end: usize,
}

impl TokenSpan {
    /// The span `[start, end)`, or the empty span at `start` if `end` lies before it.
    pub fn new(start: usize, end: usize) -> Self {
        Self { start, end: end.max(start) }
    }

    /// The positions, in order.
    pub fn iter(self) -> std::ops::Range<usize> {
        self.start..self.end
    }

    /// The positions that are in both, or the empty span at the later start.
    pub fn intersection(self, other: Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Number of positions.
    pub fn len(self) -> usize {
        self.end - self.start
    }

    /// Whether there is no position in it.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }
}
