//! Incremental detokenization: text as soon as it is final, never half a character.

use std::sync::Arc;

use crate::tokenizer::Tokenizer;

/// What a decoder writes for bytes that are (still) no character.
const REPLACEMENT: char = '\u{FFFD}';
/// A character has at most four bytes, so at most four byte tokens.
const MAX_TOKENS_PER_CHAR: usize = 4;
/// Prompt tokens that give the first generated token its context (vLLM takes five, and one that gives them theirs).
const CONTEXT_TOKENS: usize = 6;

/// Turns the tokens of one choice into text, one at a time.
///
/// vLLM's scheme: a window of ids is decoded twice, with and without the new token, and the difference is the new text,
/// so that decoders which look at a token's neighbours (leading spaces, byte fallback) see them. The pieces, with
/// [`Detokenizer::finish`], join to the text of all ids at once. One exception is forced by streaming: byte-fallback
/// decoders void a whole run of byte tokens when one of its bytes is invalid, also characters already sent.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    /// `ids[..read]` is context whose text has been sent, `ids[read..]` waits for more bytes.
    ids: Vec<u32>,
    read: usize,
    /// Text of `ids[..read]`.
    context: String,
    /// Text of the whole window at the last push, if it was held back.
    held: String,
    any_generated: bool,
}

impl Detokenizer {
    /// Begins a choice after `prompt`, whose last tokens serve as context only.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32], skip_special_tokens: bool) -> Self {
        let ids = prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..].to_vec();
        let decode = |ids: &[u32]| tokenizer.decode(ids, skip_special_tokens);
        // A prompt that ends inside a character leaves its bytes for the first generated token to complete.
        let read = (ids.len().saturating_sub(MAX_TOKENS_PER_CHAR - 1)..=ids.len())
            .rev()
            .find(|end| !decode(&ids[..*end]).ends_with(REPLACEMENT))
            .unwrap_or(ids.len());
        let context = decode(&ids[..read]);
        Self { tokenizer, skip_special_tokens, ids, read, context, held: String::new(), any_generated: false }
    }

    /// Adds one token and returns the text that became final, often none.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        self.any_generated = true;
        let text = self.decode(&self.ids);
        if text.len() <= self.context.len() {
            return String::new();
        }
        if !text.ends_with(REPLACEMENT) {
            return self.settle(&text, self.ids.len());
        }
        // More tokens than a character can need: what the last token left unchanged is final, however odd.
        let waiting = self.ids.len() - self.read;
        if waiting > MAX_TOKENS_PER_CHAR && self.held.len() < text.len() && text.starts_with(&self.held) {
            let settled = std::mem::take(&mut self.held);
            return self.settle(&settled, self.ids.len() - 1);
        }
        self.held = text;
        String::new()
    }

    /// Ends the choice and returns what was held back, incomplete characters as U+FFFD.
    pub fn finish(&mut self) -> String {
        if !self.any_generated {
            return String::new();
        }
        let text = self.decode(&self.ids);
        if text.len() <= self.context.len() { String::new() } else { self.settle(&text, self.ids.len()) }
    }

    /// Sends `text`, the text of `ids[..end]`, and makes the tokens just sent the new context.
    fn settle(&mut self, text: &str, end: usize) -> String {
        let piece = match text.strip_prefix(self.context.as_str()) {
            Some(piece) => piece.to_owned(),
            // Text already sent has changed (an invalid byte behind a valid character): it stays sent.
            None => self.decode(&self.ids[self.read..end]),
        };
        self.ids.drain(..self.read);
        self.read = end - self.read;
        self.context = self.decode(&self.ids[..self.read]);
        // Of a held window only the tokens behind the new context still wait; they are decoded with it next time.
        self.held = if self.ids.len() > self.read { self.decode(&self.ids) } else { String::new() };
        piece
    }

    fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, self.skip_special_tokens)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fixtures::{byte_fallback, byte_level};

    fn stream(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32], skip: bool) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), prompt, skip);
        let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
        pieces.push(detokenizer.finish());
        pieces
    }

    #[test]
    fn a_character_is_sent_when_its_last_byte_is_there() {
        for tokenizer in [byte_level(), byte_fallback()] {
            let ids = "a€b".bytes().map(u32::from).collect::<Vec<_>>();
            assert_eq!(stream(&tokenizer, &[], &ids, true), ["a", "", "", "€", "b", ""]);
        }
    }

    #[test]
    fn an_unfinished_character_comes_at_the_end() {
        let ids = [b'a', 0xE2, 0x82].map(u32::from);
        assert_eq!(stream(&byte_level(), &[], &ids, true), ["a", "", "", "\u{FFFD}"]);
    }

    #[test]
    fn a_leading_space_survives_behind_a_prompt() {
        let tokenizer = byte_fallback();
        let hello = tokenizer.token_id("▁Hello").expect("in the fixture");
        assert_eq!(stream(&tokenizer, &[], &[hello], true).concat(), "Hello");
        assert_eq!(stream(&tokenizer, &[hello], &[hello], true).concat(), " Hello");
    }

    #[test]
    fn bytes_that_never_form_a_character_are_not_held_forever() {
        for tokenizer in [byte_level(), byte_fallback()] {
            let pieces = stream(&tokenizer, &[], &[0xFF; 40], true);
            assert_eq!(pieces.concat(), "\u{FFFD}".repeat(40));
            assert!(pieces[..20].concat().chars().count() >= 10, "{pieces:?}");
        }
    }

    #[test]
    fn what_was_sent_stays_when_a_later_byte_is_invalid() {
        let tokenizer = byte_fallback();
        let ids = [0xC3, 0xA9, 0xFF, tokenizer.token_id("b").expect("in the fixture")];
        assert_eq!(stream(&tokenizer, &[], &ids, true), ["", "é", "", "\u{FFFD}b", ""]);
    }

    #[test]
    fn a_prompt_that_ends_inside_a_character_is_completed() {
        assert_eq!(stream(&byte_level(), &[u32::from(b'x'), 0xC3], &[0xA9], true).concat(), "é");
    }

    #[test]
    fn nothing_generated_gives_nothing() {
        assert_eq!(stream(&byte_level(), &[0xC3], &[], true).concat(), "");
    }

    /// Ids that make valid characters often enough: whole characters byte by byte, mixed with any id.
    fn ids(vocab: u32) -> impl Strategy<Value = Vec<u32>> {
        let any_id = (0..vocab).prop_map(|id| vec![id]);
        let any_char = any::<char>().prop_map(|c| c.to_string().bytes().map(u32::from).collect());
        prop::collection::vec(prop_oneof![any_id, any_char], 0..24).prop_map(|lists: Vec<Vec<u32>>| lists.concat())
    }

    proptest! {
        #[test]
        fn byte_level_pieces_join_to_the_whole(ids in ids(262), skip: bool) {
            let tokenizer = byte_level();
            prop_assert_eq!(stream(&tokenizer, &[], &ids, skip).concat(), tokenizer.decode(&ids, skip));
        }

        #[test]
        fn byte_fallback_pieces_join_to_the_whole(ids in ids(266), skip: bool) {
            let tokenizer = byte_fallback();
            let whole = tokenizer.decode(&ids, skip);
            let joined = stream(&tokenizer, &[], &ids, skip).concat();
            // Only an invalid run voids characters that were already sent.
            if !whole.contains(REPLACEMENT) {
                prop_assert_eq!(joined, whole);
            }
        }

        #[test]
        fn with_a_prompt_the_pieces_join_to_what_follows_it(
            prompt in prop::collection::vec(256u32..265, 0..9),
            ids in prop::collection::vec(256u32..266, 0..24),
        ) {
            let tokenizer = byte_fallback();
            let whole = tokenizer.decode(&[prompt.clone(), ids.clone()].concat(), true);
            let before = tokenizer.decode(&prompt, true);
            let after = whole.strip_prefix(before.as_str()).expect("no byte pieces, so the prompt's text stays");
            let joined = stream(&tokenizer, &prompt, &ids, true).concat();
            prop_assert_eq!(joined.as_str(), after);
        }
    }
}
