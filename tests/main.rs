//! The integration tests: one binary, so that everything links once.

mod golden;
mod parity;
mod process;
mod serve;
mod support;
