//! From text to token ids and back: the tokenizer, chat templates, incremental detokenization and stop strings.
//!
//! Nothing here knows the engine or the wire; every part works on one string or one list of ids.

#![forbid(unsafe_code)]

mod chat;
mod detokenize;
mod error;
#[cfg(test)]
mod fixtures;
mod jinja;
mod messages;
mod python;
mod special;
mod stop;
mod strftime;
mod tokenizer;

pub use chat::{ChatPrompt, ChatTemplate};
pub use detokenize::Detokenizer;
pub use error::{ChatError, TextError};
pub use special::SpecialTokens;
pub use stop::{StopOutcome, StopStrings};
pub use tokenizer::Tokenizer;
