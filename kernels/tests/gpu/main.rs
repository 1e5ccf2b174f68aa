//! The GPU kernels against their references: on the emulation, or on an NVIDIA GPU where `MOETRAIL_TEST_DEVICE=cuda`.

#![allow(clippy::unwrap_used)]

#[path = "../forms/replay.rs"]
mod replay;
#[path = "../forms/toss.rs"]
#[allow(dead_code)]
mod toss;

mod attention;
mod device;
mod driver;
mod experts;
mod linear;
mod norm;
mod qkv;
mod ring;
mod router;
mod sample;
