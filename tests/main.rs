//! The integration tests: one binary, so that everything links once.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod corpus;
mod golden;
mod identities;
mod parity;
mod pressure;
mod process;
mod routes;
mod serve;
mod support;
