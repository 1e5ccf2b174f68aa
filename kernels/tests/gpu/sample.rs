use moetrail_kernels::gpu::{
    Arena, DeviceBuffer, Gpu, SampleBatch, SampleParams, SampledToken, sample, sample_with_limits, take_sampled,
};
use moetrail_kernels::reference;
use proptest::prelude::*;

use crate::device::{floats, gpu};
use crate::toss::Toss;

const GREEDY: SampleParams = SampleParams::GREEDY;

/// What rounding of a sum may shift, relative to the sum.
const ROUNDING: f64 = 1e-6;

/// Logits of one row, of one of several kinds.
fn row(toss: &mut Toss, vocab: usize) -> Vec<f32> {
    let kind = toss.below(7);
    let scale = [0.01, 1.0, 4.0, 30.0][toss.below(4)];
    let mut logits: Vec<f32> = (0..vocab)
        .map(|_| match kind {
            // A few values only, so that all is ties.
            0 => toss.below(3) as f32,
            1 => 0.5,
            // Most cannot be sampled.
            2 if toss.below(8) > 0 => f32::NEG_INFINITY,
            3 => [0.0, -0.0, 1e-40, -1e-40][toss.below(4)],
            _ => (0..4).map(|_| toss.value()).sum::<f32>() * scale,
        })
        .collect();
    if kind == 4 {
        logits[toss.below(vocab)] = 60.0 * scale;
    }
    logits
}

fn params(toss: &mut Toss) -> SampleParams {
    let unit = |toss: &mut Toss| (toss.bits() >> 11) as f64 / (1u64 << 53) as f64;
    SampleParams {
        temperature: [0.0, 1.0, 0.3, 1.7, 12.0][toss.below(5)],
        top_k: [0, 0, 1, 2, 20, 500, 100_000][toss.below(7)],
        top_p: [1.0, 1.0, 0.999, 0.9, 0.5, 1e-6][toss.below(6)],
        min_p: [0.0, 0.0, 0.05, 1e-4, 1.0][toss.below(5)],
        uniform: match toss.below(6) {
            0 => 0.0,
            1 => 1.0 - 0.5f64.powi(53),
            _ => unit(toss),
        },
        logprobs: [None, Some(0), Some(1), Some(5), Some(20)][toss.below(5)],
        given: None,
    }
}

fn run(gpu: &Gpu, logits: &[f32], params: &[SampleParams], limits: Option<(usize, usize)>) -> Vec<SampledToken> {
    let arena = Arena::new(gpu);
    let rows = floats(&arena, logits, logits.len() / params.len());
    let tokens: Vec<(u32, SampleParams)> = (0..).zip(params.iter().copied()).collect();
    let batch = SampleBatch::new(&tokens);
    let words = DeviceBuffer::of(gpu, batch.words()).unwrap();
    let samples = match limits {
        None => sample(&arena, &rows, &batch, words.address()).unwrap(),
        Some((list, blocks)) => sample_with_limits(&arena, &rows, &batch, words.address(), list, blocks).unwrap(),
    };
    assert_eq!((samples.len(), samples.place().1), (params.len(), params.len() * samples.row_words()));
    samples.to_host().unwrap()
}

/// Whether the random number meets the token's share of the candidates' mass, but for rounding.
fn is_sampled(logits: &[f32], params: &SampleParams, token: u32) -> bool {
    let near = |top_p: f32| {
        let candidates = reference::sample_candidates(logits, &SampleParams { top_p, ..*params });
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let Some(at) = candidates.iter().position(|(id, _)| *id == token) else { return false };
        let before: f64 = candidates[..at].iter().map(|(_, weight)| weight).sum();
        let (first, end) = (before / total, (before + candidates[at].1) / total);
        first - ROUNDING <= params.uniform && params.uniform <= end + ROUNDING
    };
    let top_p = params.top_p;
    near(top_p) || top_p < 1.0 && [1.0 - 1e-6, 1.0 + 1e-6].iter().any(|by| near((top_p * by).min(1.0 - 1e-7)))
}

fn check(logits: &[f32], params: &SampleParams, got: &SampledToken) {
    assert_eq!(got.is_nan, logits.iter().any(|logit| logit.is_nan()));
    if got.is_nan {
        return;
    }
    let expected = params.given.or_else(|| reference::sample_token(logits, params));
    match got.token {
        Some(token) if got.token != expected => {
            assert!(
                !params.is_greedy() && is_sampled(logits, params, token),
                "{got:?}, expected {expected:?}: {params:?}"
            );
        }
        token => assert_eq!(token, expected, "{params:?}"),
    }
    assert_eq!(got.logprobs.is_some(), params.logprobs.is_some());
    if let (Some(token), Some(top), Some(got)) = (got.token, params.logprobs, &got.logprobs) {
        let (logprob, rank, expected) = reference::token_logprobs(logits, token, top);
        // A given token may be one of a row that has no best logit.
        let close = |a: f32, b: f32| a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= 4e-6 * (1.0 + b.abs());
        assert!(close(got.logprob, logprob), "{} is not {logprob}", got.logprob);
        assert_eq!(got.rank, rank);
        assert_eq!(got.top.len(), expected.len());
        for (got, expected) in got.top.iter().zip(&expected) {
            assert!(got.0 == expected.0 && close(got.1, expected.1), "{got:?}, expected {expected:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Tokens and logprobs are the reference's; a row alone, other blocks and the other way to cut give the same.
    #[test]
    fn samples_agree(seed: u64, m in 1usize..7, vocab in prop_oneof![1usize..50, 50usize..3000, 3000usize..12000]) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let mut toss = Toss::new(seed);
        let mut logits: Vec<f32> = (0..m).flat_map(|_| row(&mut toss, vocab)).collect();
        if toss.below(4) == 0 {
            logits[toss.below(m * vocab)] = f32::NAN;
        }
        let given = |toss: &mut Toss| (toss.below(4) == 0).then(|| toss.below(vocab) as u32);
        let params: Vec<SampleParams> =
            (0..m).map(|_| SampleParams { given: given(&mut toss), ..params(&mut toss) }).collect();
        let got = run(&gpu, &logits, &params, None);
        for ((logits, params), got) in logits.chunks(vocab).zip(&params).zip(&got) {
            check(logits, params, got);
        }
        let readable = |got: &[SampledToken]| format!("{got:?}");
        let limits = ([0, 7, 2048][toss.below(3)], 1 + toss.below(9));
        assert_eq!(readable(&run(&gpu, &logits, &params, Some(limits))), readable(&got), "{limits:?}");
        let at = toss.below(m);
        let alone = run(&gpu, &logits[at * vocab..][..vocab], &params[at..=at], None);
        assert_eq!(readable(&alone), readable(&got[at..=at]), "a row alone");
    }
}

/// Several tokens of one row, rows that nobody reads, and several batches read at once.
#[test]
fn tokens_name_their_rows() {
    let Some(gpu) = gpu(4) else { return };
    let (vocab, mut toss) = (700, Toss::new(4));
    let mut logits: Vec<f32> = (0..4).flat_map(|_| row(&mut toss, vocab)).collect();
    logits[3 * vocab] = f32::NAN;
    let id = |token: SampledToken| token.token.unwrap_or(0);
    let arena = Arena::new(&gpu);
    let rows = floats(&arena, &logits, vocab);
    let mut samples = Vec::new();
    let batches: [&[u32]; 3] = [&[2, 0, 0, 3, 0], &[], &[3]];
    let batches = batches.map(|rows| rows.iter().map(|row| (*row, params(&mut toss))).collect::<Vec<_>>());
    for tokens in &batches {
        let batch = SampleBatch::new(tokens);
        let words = DeviceBuffer::of(&gpu, batch.words()).unwrap();
        samples.push(sample(&arena, &rows, &batch, words.address()).unwrap());
        assert_eq!(samples.last().map(|samples| samples.len()), Some(tokens.len()));
    }
    let places: Vec<_> = samples.iter().map(|samples| samples.place()).collect();
    let words = gpu.send_words(&places).unwrap().finish().unwrap();
    for ((tokens, samples), words) in batches.iter().zip(&samples).zip(&words) {
        for ((row, params), got) in tokens.iter().zip(samples.parse(words)) {
            let own = &logits[*row as usize * vocab..][..vocab];
            check(own, params, &got);
            assert_eq!(format!("{got:?}"), format!("{:?}", run(&gpu, own, &[*params], None)[0]));
        }
    }
    // The next step's rows take some of them, counted over the batches; others keep their ids.
    let tokens: Vec<u32> = samples.iter().zip(&words).flat_map(|(s, words)| s.parse(words)).map(id).collect();
    let sources = [5, u32::MAX, 0, 6, 2];
    let (ids, sources) = (DeviceBuffer::of(&gpu, &[900u32; 5]).unwrap(), DeviceBuffer::of(&gpu, &sources).unwrap());
    take_sampled(&samples, sources.address(), ids.address(), 5).unwrap();
    assert_eq!(gpu.read::<u32>(ids.address(), 5).unwrap(), [tokens[5], 900, tokens[0], 900, tokens[2]]);
    let beyond = SampleBatch::new(&[(4, GREEDY)]);
    let words = DeviceBuffer::of(&gpu, beyond.words()).unwrap();
    assert!(sample(&arena, &rows, &beyond, words.address()).is_err());
}

/// One row of a large vocabulary, which many blocks share.
#[test]
fn a_large_vocabulary_agrees() {
    let Some(gpu) = gpu(5) else { return };
    let (vocab, mut toss) = (151_936, Toss::new(5));
    let logits: Vec<f32> = (0..vocab).map(|_| (0..6).map(|_| toss.value()).sum::<f32>() * 2.0).collect();
    let base = SampleParams { temperature: 0.8, logprobs: Some(20), ..GREEDY };
    let ways = [
        SampleParams { uniform: 0.7, ..base },
        SampleParams { uniform: 0.3, top_p: 0.95, ..base },
        SampleParams { uniform: 0.9, top_k: 20, top_p: 0.8, ..base },
        // More candidates than are sorted.
        SampleParams { uniform: 0.6, temperature: 3.0, top_p: 0.9, ..base },
    ];
    for params in ways {
        check(&logits, &params, &run(&gpu, &logits, &[params], None)[0]);
    }
}

#[test]
fn greedy_takes_the_lower_id_of_a_tie() {
    let Some(gpu) = gpu(1) else { return };
    let token = |logits: &[f32]| run(&gpu, logits, &[GREEDY], None)[0].token;
    assert_eq!(token(&[1.0, 2.0, 2.0]), Some(1));
    assert_eq!(token(&[-0.0, 0.0]), Some(0));
    assert_eq!(token(&[f32::NEG_INFINITY; 40]), None);
    assert_eq!(token(&[f32::NEG_INFINITY, -1e30, f32::INFINITY]), Some(2));
    for best in [0, 31, 32, 255, 256, 2047, 2048, 4000] {
        let logits: Vec<f32> = (0..4096).map(|id| if id >= best && id % 7 == best % 7 { 3.0 } else { -1.0 }).collect();
        assert_eq!(token(&logits), Some(best as u32));
    }
}

/// A row whose weights are not numbers has no token, and disturbs no other.
#[test]
fn what_cannot_be_sampled_is_said() {
    let Some(gpu) = gpu(2) else { return };
    let sampled = SampleParams { temperature: 1.0, uniform: 0.5, logprobs: Some(2), ..GREEDY };
    let ways = [sampled, SampleParams { top_p: 0.5, ..sampled }, SampleParams { top_k: 2, ..sampled }];
    let good = [0.0, 9.0, 1.0, 2.0];
    for bad in [[f32::NEG_INFINITY; 4], [f32::INFINITY, 0.0, 1.0, 2.0], [f32::NAN; 4]] {
        for params in ways {
            let logits: Vec<f32> = bad.iter().chain(&good).copied().collect();
            let got = run(&gpu, &logits, &[params, params], None);
            assert_eq!((got[0].token, got[0].is_nan), (None, bad[0].is_nan()), "{bad:?}");
            assert_eq!((got[1].token, got[1].is_nan), (Some(1), false));
        }
    }
    // A temperature that makes a finite logit infinite.
    let hot = SampleParams { temperature: 2e-5, ..sampled };
    assert_eq!(run(&gpu, &[3e38, 0.0], &[hot], None)[0].token, reference::sample_token(&[3e38, 0.0], &hot));
}

#[test]
fn frequencies_follow_the_probabilities() {
    let Some(gpu) = gpu(3) else { return };
    let logits = [0.1f32.ln(), 0.6f32.ln(), 0.3f32.ln()];
    let n = 400;
    let params: Vec<SampleParams> =
        (0..n).map(|i| SampleParams { temperature: 1.0, uniform: (i as f64 + 0.5) / n as f64, ..GREEDY }).collect();
    let got = run(&gpu, &logits.repeat(n), &params, None);
    let hits = |token: u32| got.iter().filter(|got| got.token == Some(token)).count();
    assert_eq!([hits(0), hits(1), hits(2)], [40, 240, 120]);
}
