//! Stop strings, matched across the borders of streamed pieces.

/// What one piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopOutcome {
    /// Text that is final and may be sent.
    pub emit: String,
    /// Index of the stop string that was completed; nothing may follow.
    pub stopped: Option<usize>,
}

/// Watches the text of one choice for stop strings and holds back what could become one.
///
/// The match that is complete first wins, so that the outcome does not depend on how the text was cut into pieces; of
/// several that end together, the longest.
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    include: bool,
    /// The longest end of the text so far that begins some stop string.
    tail: String,
    /// How much of `tail` has been sent; all of it if the stop string is included, else nothing.
    sent: usize,
}

impl StopStrings {
    /// Watches for `stops` (empty ones are ignored); `include` leaves the completed string in the text.
    pub fn new(stops: Vec<String>, include: bool) -> Self {
        Self { stops, include, tail: String::new(), sent: 0 }
    }

    /// The stop string with this index.
    pub fn get(&self, index: usize) -> Option<&str> {
        self.stops.get(index).map(String::as_str)
    }

    /// Adds text; after a stop nothing more should be added.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.stops.is_empty() {
            return StopOutcome { emit: text.to_owned(), stopped: None };
        }
        self.tail.push_str(text);
        if let Some((start, end, index)) = self.first_match() {
            let cut = if self.include { end } else { start };
            let emit = self.tail[self.sent.min(cut)..cut].to_owned();
            self.tail.clear();
            self.sent = 0;
            return StopOutcome { emit, stopped: Some(index) };
        }
        let keep = self.candidate_start();
        let upto = if self.include { self.tail.len() } else { keep };
        let emit = self.tail[self.sent..upto].to_owned();
        self.tail.drain(..keep);
        self.sent = upto - keep;
        StopOutcome { emit, stopped: None }
    }

    /// Ends the text and returns what was held back.
    pub fn finish(&mut self) -> String {
        let rest = self.tail.split_off(self.sent);
        self.tail.clear();
        self.sent = 0;
        rest
    }

    /// `(start, end, index)` of the match that ends first, the longest of those that end together.
    fn first_match(&self) -> Option<(usize, usize, usize)> {
        self.stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .filter_map(|(index, stop)| self.tail.find(stop.as_str()).map(|start| (start, start + stop.len(), index)))
            .min_by_key(|(start, end, index)| (*end, *start, *index))
    }

    /// Where the longest end of `tail` begins that some stop string begins with.
    fn candidate_start(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.tail.len().saturating_sub(longest);
        (from..self.tail.len())
            .filter(|start| self.tail.is_char_boundary(*start))
            .find(|start| self.stops.iter().any(|stop| stop.starts_with(&self.tail[*start..])))
            .unwrap_or(self.tail.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Text and stop string found by looking at every prefix of the whole text.
    fn naive(text: &str, stops: &[String], include: bool) -> (String, Option<usize>) {
        for end in (0..=text.len()).filter(|end| text.is_char_boundary(*end)) {
            let ended = stops.iter().enumerate().filter(|(_, s)| !s.is_empty() && text[..end].ends_with(s.as_str()));
            if let Some((index, stop)) = ended.max_by_key(|(index, s)| (s.len(), std::cmp::Reverse(*index))) {
                let cut = if include { end } else { end - stop.len() };
                return (text[..cut].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    fn run(pieces: &[&str], stops: &[&str], include: bool) -> (String, Option<usize>) {
        let mut watch = StopStrings::new(stops.iter().map(|s| s.to_string()).collect(), include);
        let mut text = String::new();
        for piece in pieces {
            let outcome = watch.push(piece);
            text += &outcome.emit;
            if outcome.stopped.is_some() {
                return (text, outcome.stopped);
            }
        }
        text += &watch.finish();
        (text, None)
    }

    #[test]
    fn a_stop_string_across_pieces_is_cut() {
        assert_eq!(run(&["Hello <", "st", "op> more"], &["<stop>"], false), ("Hello ".into(), Some(0)));
        assert_eq!(run(&["Hello <", "st", "op> more"], &["<stop>"], true), ("Hello <stop>".into(), Some(0)));
    }

    #[test]
    fn a_beginning_that_does_not_complete_is_sent_later() {
        let mut watch = StopStrings::new(vec!["abc".into()], false);
        assert_eq!(watch.push("xab"), StopOutcome { emit: "x".into(), stopped: None });
        assert_eq!(watch.push("ab"), StopOutcome { emit: "ab".into(), stopped: None });
        assert_eq!(watch.finish(), "ab");
    }

    #[test]
    fn the_first_completed_match_wins_and_the_longest_of_those() {
        assert_eq!(run(&["abcd"], &["abcd", "bc"], false), ("a".into(), Some(1)));
        assert_eq!(run(&["xabc"], &["bc", "abc"], false), ("x".into(), Some(1)));
    }

    proptest! {
        #[test]
        fn pieces_agree_with_a_search_of_the_whole_text(
            text in "[abé]{0,24}",
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
            cuts in prop::collection::vec(1usize..5, 24),
            include: bool,
        ) {
            let chars: Vec<char> = text.chars().collect();
            let mut pieces = Vec::new();
            let mut at = 0;
            for cut in cuts {
                let end = (at + cut).min(chars.len());
                pieces.push(chars[at..end].iter().collect::<String>());
                at = end;
            }
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let borrowed: Vec<&str> = stops.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&pieces, &borrowed, include), naive(&text, &stops, include));
        }
    }
}
