//! The rows of one sequence that have reached the host.

use crate::span::TokenSpan;

/// Rows on the host: contiguous, absolute, from the honoured start on. The first writer of a position wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowLedger {
    start: usize,
    row_bytes: usize,
    data: Vec<u8>,
}

/// Why rows were not appended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// Rows between the ledger's end and the new rows are missing.
    #[error("rows [{end}, {start_pos}) are missing: the ledger ends at {end}, the new rows start at {start_pos}")]
    Gap {
        /// Where the ledger ends.
        end: usize,
        /// Where the new rows start.
        start_pos: usize,
    },
    /// The byte count is no whole number of rows.
    #[error("{bytes} bytes are no whole number of rows of {row_bytes} bytes")]
    PartialRow {
        /// Bytes given.
        bytes: usize,
        /// Bytes of one row.
        row_bytes: usize,
    },
}

impl RowLedger {
    /// An empty ledger that begins at position `start`, with rows of `row_bytes` (at least 1) bytes.
    pub fn new(start: usize, row_bytes: usize) -> Self {
        Self { start, row_bytes: row_bytes.max(1), data: Vec::new() }
    }

    /// Makes room for the rows up to position `end`, so that few are copied while the ledger grows: for 32 MiB at most,
    /// since a request may name a length that it never reaches.
    pub fn reserve(&mut self, end: usize) {
        let bytes = self.missing(end).len().saturating_mul(self.row_bytes).min(32 << 20);
        // Without the room it grows as it is filled.
        let _ = self.data.try_reserve_exact(bytes);
    }

    /// The honoured start.
    pub fn start(&self) -> usize {
        self.start
    }

    /// One past the last position on the host.
    pub fn end(&self) -> usize {
        self.start + self.data.len() / self.row_bytes
    }

    /// The positions on the host.
    pub fn span(&self) -> TokenSpan {
        TokenSpan::new(self.start, self.end())
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// The rows, C order.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The positions still to be copied for the ledger to reach `upto`: what a gather plan covers.
    pub fn missing(&self, upto: usize) -> TokenSpan {
        TokenSpan::new(self.end(), upto)
    }

    /// Appends the rows of `[start_pos, …)`; those that the ledger holds already are dropped.
    ///
    /// # Errors
    /// [`LedgerError::Gap`] if `start_pos` lies beyond the end, [`LedgerError::PartialRow`] for a broken byte count.
    pub fn append(&mut self, start_pos: usize, rows: &[u8]) -> Result<(), LedgerError> {
        if !rows.len().is_multiple_of(self.row_bytes) {
            return Err(LedgerError::PartialRow { bytes: rows.len(), row_bytes: self.row_bytes });
        }
        let end = self.end();
        if start_pos > end {
            return Err(LedgerError::Gap { end, start_pos });
        }
        let known = (end - start_pos).saturating_mul(self.row_bytes);
        if let Some(new) = rows.get(known..) {
            self.data.extend_from_slice(new);
        }
        Ok(())
    }

    /// Lets `fill` append the missing rows up to position `upto`.
    ///
    /// This is the way a drain takes: the rows are copied once, from the ring to the end of the ledger.
    ///
    /// # Panics
    /// If `fill` appends anything but the bytes of the missing rows.
    pub fn fill(&mut self, upto: usize, fill: impl FnOnce(&mut Vec<u8>)) {
        let expected = self.data.len() + self.missing(upto).len() * self.row_bytes;
        fill(&mut self.data);
        assert_eq!(self.data.len(), expected, "the rows up to {upto}, and nothing else");
    }

    /// Puts the bytes of rows in place that [`fill`](Self::fill) left room for, from position `start_pos` on.
    ///
    /// # Panics
    /// If the ledger does not hold these positions.
    pub fn land(&mut self, start_pos: usize, rows: &[u8]) {
        let first = start_pos.checked_sub(self.start).expect("rows land behind the start") * self.row_bytes;
        self.data[first..first + rows.len()].copy_from_slice(rows);
    }

    /// Drops the rows from position `end` on.
    pub fn truncate(&mut self, end: usize) {
        self.data.truncate(end.saturating_sub(self.start) * self.row_bytes);
    }

    /// The rows as bytes, without a copy.
    pub fn into_data(self) -> Vec<u8> {
        self.data
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_gap_is_an_error_and_changes_nothing() {
        let mut ledger = RowLedger::new(4, 2);
        ledger.append(4, &[1, 1, 2, 2]).unwrap();
        let error = ledger.append(7, &[9, 9]).unwrap_err();
        assert_eq!(error, LedgerError::Gap { end: 6, start_pos: 7 });
        assert_eq!(ledger.span(), TokenSpan::new(4, 6));
    }

    proptest! {
        /// Against a map that keeps the first value ever written to each position.
        #[test]
        fn the_first_writer_wins(start in 0usize..20, appends in prop::collection::vec((0usize..40, 0usize..12, any::<u8>()), 0..20)) {
            let mut ledger = RowLedger::new(start, 1);
            let mut model = BTreeMap::new();
            for (start_pos, rows, value) in appends {
                let end = start + model.len();
                let result = ledger.append(start_pos, &vec![value; rows]);
                prop_assert_eq!(result.is_ok(), start_pos <= end);
                if start_pos <= end {
                    for position in start_pos.max(start)..start_pos + rows {
                        model.entry(position).or_insert(value);
                    }
                }
                prop_assert_eq!(ledger.end(), start + model.len());
            }
            prop_assert_eq!(ledger.into_data(), model.into_values().collect::<Vec<_>>());
        }
    }
}
