//! What can go wrong between text and token ids.

use std::path::PathBuf;

/// A tokenizer that could not be loaded, or a text that it cannot encode.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file of the checkpoint could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file of the checkpoint is not what it should be.
    #[error("{}: {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        message: String,
    },
    /// The tokenizer refuses the text, for instance an unknown character without an unknown token.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
}

/// A conversation that could not be turned into a prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// The checkpoint has no chat template.
    #[error("the checkpoint has no chat template; send a prompt to /v1/completions instead")]
    NoTemplate,
    /// There are several templates and none of them is the default.
    #[error("the checkpoint has no default chat template, only {0:?}")]
    NoDefault(Vec<String>),
    /// The template cannot be compiled; a fault of the checkpoint.
    #[error("the chat template {name} does not compile: {message}")]
    Syntax {
        /// Name of the template.
        name: String,
        /// What the compiler says.
        message: String,
    },
    /// The template called `raise_exception`; the message is its own.
    #[error("{0}")]
    Raised(String),
    /// The template failed on these messages.
    #[error("the chat template cannot render these messages: {0}")]
    Render(String),
    /// A message is not what a message is.
    #[error("{message}")]
    Message {
        /// Where, such as `messages[0].content[1].type`.
        param: String,
        /// What is wrong, with the value.
        message: String,
    },
    /// The final message cannot be continued.
    #[error("continue_final_message: {0}")]
    Continue(&'static str),
}

impl ChatError {
    /// The request parameter at fault.
    pub fn param(&self) -> &str {
        match self {
            Self::Message { param, .. } => param,
            Self::Continue(_) => "continue_final_message",
            _ => "messages",
        }
    }
}
