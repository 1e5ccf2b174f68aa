//! The server over a real engine on a golden checkpoint: one binary, so that everything links once.

mod answers;
mod connections;
mod control;
mod refusals;
mod support;
