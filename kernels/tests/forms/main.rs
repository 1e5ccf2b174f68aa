//! Every form of every kernel against its reference within a stated bound, and against itself bit by bit: a row gives
//! the same bits alone, in any batch, in any order and on any number of threads.

#![allow(clippy::unwrap_used)]

mod attention;
mod experts;
mod norm;
mod product;
mod qkv;
mod replay;
mod router;
mod rows;
mod tensors;
mod toss;
