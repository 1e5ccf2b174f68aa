//! The turns of conversations as branches: for each, all token ids and the rows of all that were forwarded.

use crate::rows::ExpertRows;
use crate::span::TokenSpan;

/// One turn: what was sent, what came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Token ids of the whole prompt.
    pub prompt_ids: Vec<u32>,
    /// Token ids of the completion.
    pub completion_ids: Vec<u32>,
    /// The rows that came with it.
    pub rows: Option<ExpertRows>,
}

/// One line of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Branch {
    /// Token ids from the first on.
    pub token_ids: Vec<u32>,
    /// Rows from position 0 on, normally one less than there are tokens; `None` if no turn brought any.
    pub rows: Option<ExpertRows>,
}

/// What stitching gives.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stitched {
    /// The branches, in the order in which they were opened.
    pub branches: Vec<Branch>,
    /// Rows that a turn brought again and that differ from those known; the first ones stay.
    pub differing: usize,
}

/// Why a turn cannot be stitched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("turn {turn}: {reason}")]
pub struct StitchError {
    /// Index of the turn.
    pub turn: usize,
    /// What is wrong with it.
    pub reason: StitchReason,
}

/// What is wrong with a turn.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StitchReason {
    /// Its rows do not end where the last forwarded token is.
    #[error(
        "its rows end at {found}, {prompt} prompt and {completion} completion tokens need them to end at {expected}"
    )]
    End {
        /// Where they end.
        found: usize,
        /// Where they should.
        expected: usize,
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens of the completion.
        completion: usize,
    },
    /// Rows before its own are not known.
    #[error("rows [{known}, {start}) are missing: its rows start at {start}, the branch has rows up to {known}")]
    Gap {
        /// Rows known.
        known: usize,
        /// Where its rows start.
        start: usize,
    },
    /// It extends a branch that has rows and brings none.
    #[error("it has no rows, the branch that it extends has {known}")]
    Missing {
        /// Rows of the branch.
        known: usize,
    },
    /// Its rows are of another model.
    #[error("its rows are [{}, {}], those before are [{}, {}] (layers, top_k)", found[0], found[1], known[0], known[1])]
    Shape {
        /// Layers and experts per token of the turn.
        found: [usize; 2],
        /// Layers and experts per token of the branch.
        known: [usize; 2],
    },
}

/// Stitches turns in their order.
///
/// A turn whose prompt begins with all tokens of a branch extends it (the longest, if there are several): it must bring
/// rows from where the branch's rows end, or from before; known rows stay, others are appended. Any other turn opens a
/// branch: the longest common prefix lends its rows below the turn's own start.
///
/// ```
/// use moetrail_routes::{ExpertDtype, ExpertRows, RowLayout, Turn, stitch};
///
/// let layout = RowLayout { num_layers: 1, top_k: 1, dtype: ExpertDtype::U8 };
/// let rows = |start, data: &[u8]| ExpertRows::new(start, layout, data.to_vec()).ok();
/// let turns = [
///     Turn { prompt_ids: vec![1, 2], completion_ids: vec![3], rows: rows(0, &[10, 20]) },
///     // The boundary row, that of token 3, comes with the next turn.
///     Turn { prompt_ids: vec![1, 2, 3, 4], completion_ids: vec![5], rows: rows(2, &[30, 40]) },
/// ];
/// let stitched = stitch(&turns).unwrap();
/// assert_eq!(stitched.branches[0].token_ids, [1, 2, 3, 4, 5]);
/// assert_eq!(stitched.branches[0].rows.as_ref().unwrap().data(), [10, 20, 30, 40]);
/// ```
///
/// # Errors
/// [`StitchError`] naming the turn.
pub fn stitch(turns: &[Turn]) -> Result<Stitched, StitchError> {
    let mut stitched = Stitched::default();
    for (turn, next) in turns.iter().enumerate() {
        stitched.add(next).map_err(|reason| StitchError { turn, reason })?;
    }
    Ok(stitched)
}

impl Stitched {
    fn add(&mut self, turn: &Turn) -> Result<(), StitchReason> {
        turn.check_end()?;
        let extends = |branch: &&mut Branch| turn.prompt_ids.starts_with(&branch.token_ids);
        if let Some(branch) = self.branches.iter_mut().filter(extends).max_by_key(|branch| branch.token_ids.len()) {
            self.differing += branch.extend(turn)?;
            return Ok(());
        }
        let rows = turn.rows.as_ref().map(|rows| self.lend(turn, rows)).transpose()?;
        self.branches.push(Branch { token_ids: turn.all_ids(), rows });
        Ok(())
    }

    /// The rows of a turn that extends nothing, behind those that a branch lends.
    fn lend(&self, turn: &Turn, rows: &ExpertRows) -> Result<ExpertRows, StitchReason> {
        if rows.start() == 0 {
            return Ok(rows.clone());
        }
        let ids = turn.all_ids();
        let lent = |branch: &Branch| {
            let common = branch.token_ids.iter().zip(&ids).take_while(|(a, b)| a == b).count();
            branch.rows.as_ref().map_or(0, |rows| rows.num_rows().min(common))
        };
        let lender = self.branches.iter().max_by_key(|branch| lent(branch));
        let known = lender.map_or(0, lent);
        match lender.and_then(|lender| lender.rows.as_ref()) {
            Some(lender) if rows.start() <= known => {
                check_shape(rows, lender)?;
                Ok(followed_by(&lender.slice(TokenSpan::new(0, rows.start())), rows))
            }
            _ => Err(StitchReason::Gap { known, start: rows.start() }),
        }
    }
}

impl Turn {
    fn all_ids(&self) -> Vec<u32> {
        [&self.prompt_ids[..], &self.completion_ids].concat()
    }

    /// The last token was sampled and never forwarded, unless there is no completion.
    fn check_end(&self) -> Result<(), StitchReason> {
        let (prompt, completion) = (self.prompt_ids.len(), self.completion_ids.len());
        let expected = prompt + completion.saturating_sub(1);
        match self.rows.as_ref().map(|rows| rows.span().end) {
            Some(found) if found != expected => Err(StitchReason::End { found, expected, prompt, completion }),
            _ => Ok(()),
        }
    }
}

impl Branch {
    /// Appends a turn; returns how many rows it brought again with other ids.
    fn extend(&mut self, turn: &Turn) -> Result<usize, StitchReason> {
        let known = self.rows.as_ref().map_or(0, ExpertRows::num_rows);
        let mut differing = 0;
        match (&mut self.rows, &turn.rows) {
            (None, None) => {}
            (Some(_), None) => return Err(StitchReason::Missing { known }),
            (_, Some(rows)) if rows.start() > known => {
                return Err(StitchReason::Gap { known, start: rows.start() });
            }
            (None, Some(rows)) => self.rows = Some(rows.clone()),
            (Some(before), Some(rows)) => {
                check_shape(rows, before)?;
                let dtype = before.layout().dtype.wider(rows.layout().dtype);
                let (first, again) = (before.clone().into_dtype(dtype), rows.clone().into_dtype(dtype));
                let both = first.span().intersection(again.span());
                differing = both.iter().filter(|position| first.row(*position) != again.row(*position)).count();
                *before = followed_by(&first, &again.slice(TokenSpan::new(known, again.span().end)));
            }
        }
        self.token_ids = turn.all_ids();
        Ok(differing)
    }
}

fn check_shape(rows: &ExpertRows, before: &ExpertRows) -> Result<(), StitchReason> {
    let axes = |rows: &ExpertRows| [rows.layout().num_layers, rows.layout().top_k];
    match axes(rows) == axes(before) {
        true => Ok(()),
        false => Err(StitchReason::Shape { found: axes(rows), known: axes(before) }),
    }
}

/// Rows of which the second begin where the first end.
fn followed_by(first: &ExpertRows, second: &ExpertRows) -> ExpertRows {
    let dtype = first.layout().dtype.wider(second.layout().dtype);
    let (first, second) = (first.clone().into_dtype(dtype), second.clone().into_dtype(dtype));
    let (start, layout) = (first.start(), first.layout());
    let mut data = first.into_data();
    data.extend_from_slice(second.data());
    ExpertRows::new(start, layout, data).expect("whole rows that end where the second ones do")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dtype::ExpertDtype;
    use crate::layout::RowLayout;

    fn rows(start: usize, ids: &[u16], dtype: ExpertDtype) -> Option<ExpertRows> {
        let data = match dtype {
            ExpertDtype::U8 => ids.iter().map(|id| *id as u8).collect(),
            ExpertDtype::U16 => ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
        };
        ExpertRows::new(start, RowLayout { num_layers: 1, top_k: 1, dtype }, data).ok()
    }

    fn turn(prompt: &[u32], completion: &[u32], start: usize, ids: &[u16]) -> Turn {
        let rows = rows(start, ids, ExpertDtype::U8);
        Turn { prompt_ids: prompt.to_vec(), completion_ids: completion.to_vec(), rows }
    }

    fn reason(turns: &[Turn]) -> String {
        stitch(turns).unwrap_err().to_string()
    }

    #[test]
    fn a_branch_lends_what_is_common_and_no_more() {
        let first = turn(&[1, 2, 3], &[4, 5], 0, &[10, 20, 30, 40]);
        // Another completion of the same prompt: positions 0 to 2 are common, position 2 is its own.
        let stitched = stitch(&[first.clone(), turn(&[1, 2, 3], &[9], 2, &[33])]).unwrap();
        assert_eq!(stitched.branches.len(), 2);
        assert!(stitched.branches[1].rows.as_ref().unwrap().iter_ids().eq([10, 20, 33]));
        assert_eq!(stitched.branches[1].token_ids, [1, 2, 3, 9]);
        let error = reason(&[first.clone(), turn(&[1, 2, 7, 8], &[9], 3, &[80])]);
        assert_eq!(error, "turn 1: rows [2, 3) are missing: its rows start at 3, the branch has rows up to 2");
        assert_eq!(stitch(&[first, turn(&[7], &[8], 0, &[70])]).unwrap().branches.len(), 2);
    }

    #[test]
    fn the_first_writer_wins_and_differences_are_counted() {
        let turns = [turn(&[1, 2], &[3], 0, &[10, 20]), turn(&[1, 2, 3, 4], &[5], 0, &[10, 99, 30, 40])];
        let stitched = stitch(&turns).unwrap();
        assert_eq!(stitched.differing, 1);
        assert!(stitched.branches[0].rows.as_ref().unwrap().iter_ids().eq([10, 20, 30, 40]));
    }

    #[test]
    fn what_is_wrong_names_its_turn() {
        let first = turn(&[1, 2], &[3], 0, &[10, 20]);
        let none = |prompt: &[u32], completion: &[u32]| Turn { rows: None, ..turn(prompt, completion, 0, &[]) };
        for (next, expect) in [
            (turn(&[1, 2, 3, 4], &[5], 3, &[40]), "turn 1: rows [2, 3) are missing"),
            (turn(&[1, 2, 3, 4], &[5], 2, &[30]), "turn 1: its rows end at 3, 4 prompt and 1 completion tokens"),
            (turn(&[1, 2, 3, 4], &[], 2, &[30]), "need them to end at 4"),
            (none(&[1, 2, 3], &[4]), "turn 1: it has no rows, the branch that it extends has 2"),
        ] {
            let error = reason(&[first.clone(), next]);
            assert!(error.contains(expect), "{error}");
        }
        assert!(reason(&[turn(&[1], &[2], 1, &[])]).contains("turn 0: rows [0, 1) are missing"));
        let layout = RowLayout { num_layers: 2, top_k: 1, dtype: ExpertDtype::U8 };
        let wide = ExpertRows::new(2, layout, vec![1, 2, 3, 4]).ok();
        let error = reason(&[first, Turn { rows: wide, ..none(&[1, 2, 3, 4], &[5]) }]);
        assert_eq!(error, "turn 1: its rows are [2, 1], those before are [1, 1] (layers, top_k)");
        // No turn with rows: none.
        let stitched = stitch(&[none(&[1], &[2]), none(&[1, 2, 3], &[])]).unwrap();
        assert_eq!(stitched.branches, [Branch { token_ids: vec![1, 2, 3], rows: None }]);
        assert_eq!(stitch(&[]), Ok(Stitched::default()));
    }

    proptest! {
        /// Conversations cut into turns at random come back whole, with the rows of one forward over all of it: the id
        /// of a position is its own here, so that a row at a wrong position shows.
        #[test]
        fn a_conversation_comes_back_whole(
            tokens in prop::collection::vec(0u32..5, 2..40),
            cuts in prop::collection::btree_set(1usize..39, 1..6),
            early in prop::collection::vec(0usize..4, 6),
            wide in prop::collection::vec(any::<bool>(), 6),
            empty in prop::collection::vec(any::<bool>(), 6),
        ) {
            let mut ends: Vec<usize> = cuts.into_iter().filter(|cut| *cut < tokens.len()).collect();
            ends.push(tokens.len());
            let (mut known, mut turns) = (0usize, Vec::new());
            for (i, end) in ends.iter().enumerate() {
                let i = i % 6;
                // The completion is the last token, or there is none; rows may begin before they must.
                let prompt = if empty[i] { *end } else { end - 1 };
                if prompt < turns.last().map_or(0, |last: &Turn| last.prompt_ids.len() + last.completion_ids.len()) {
                    continue;
                }
                let last = prompt + (end - prompt).saturating_sub(1);
                let start = known.saturating_sub(early[i]).min(last);
                let ids: Vec<u16> = (start..last).map(|position| position as u16).collect();
                let dtype = if wide[i] { ExpertDtype::U16 } else { ExpertDtype::U8 };
                turns.push(Turn {
                    prompt_ids: tokens[..prompt].to_vec(),
                    completion_ids: tokens[prompt..*end].to_vec(),
                    rows: rows(start, &ids, dtype),
                });
                known = last;
            }
            let stitched = stitch(&turns).unwrap();
            prop_assert_eq!(stitched.differing, 0);
            prop_assert_eq!(stitched.branches.len(), 1);
            let branch = &stitched.branches[0];
            let last = turns.last().unwrap();
            prop_assert_eq!(&branch.token_ids, &last.all_ids());
            let rows = branch.rows.as_ref().unwrap();
            prop_assert_eq!(rows.span(), TokenSpan::new(0, known));
            prop_assert!(rows.iter_ids().eq(0..known as u16));
        }
    }
}
