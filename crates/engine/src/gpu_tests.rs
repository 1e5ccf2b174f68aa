//! The engine on a GPU, which is emulated and slow: rows come from its memory, on streams that advance by chance.

use crate::invariance_tests::{Alone, Met, check, load, runner};

#[test]
fn a_request_gives_the_same_bits_alone_and_in_any_company() {
    let Some(gpu) = moetrail_emulation::gpu(7, 1 << 30) else { return };
    let (alone, met) = (Alone::on(Some(gpu)), Met::default());
    runner(8).run(&load(), |load| check(&alone, &load, &met)).unwrap_or_else(|error| panic!("{error}"));
}
