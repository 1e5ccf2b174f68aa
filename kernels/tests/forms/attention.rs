use moetrail_kernels::{
    AttentionCall, AttentionShape, Form, KvPool, QkvCall, RopeTable, SeqSpan, WeightDtype, reference,
};
use proptest::prelude::*;

use crate::rows::{assert_bits, assert_close, pools};
use crate::toss::{Toss, dtypes};

/// Several sequences whose keys and values for all positions are known.
struct Case {
    shape: AttentionShape,
    dtype: WeightDtype,
    /// Tokens of each sequence, and how many of them are already cached.
    lengths: Vec<(usize, usize)>,
    /// For each sequence `[tokens, (heads + 2 kv_heads) * head_dim]`.
    qkv: Vec<Vec<f32>>,
}

/// One layout of the cache: a block size and where each sequence's blocks lie.
struct Layout {
    tables: Vec<Vec<u32>>,
    kv: KvPool,
}

impl Case {
    fn layout(&self, form: Form, block_size: usize, toss: &mut Toss) -> Layout {
        let blocks: usize = self.lengths.iter().map(|(tokens, _)| tokens.div_ceil(block_size)).sum();
        let mut free = toss.permutation(blocks + 3);
        let shape = &self.shape;
        let mut kv = KvPool::new(2, blocks + 3, block_size, shape.kv_heads, shape.head_dim, self.dtype);
        let no_rope = RopeTable::new(vec![], 1.0, 100_000);
        let mut tables = Vec::new();
        for (&(tokens, _), qkv) in self.lengths.iter().zip(&self.qkv) {
            let table: Vec<u32> = free.drain(..tokens.div_ceil(block_size)).map(|block| block as u32).collect();
            let positions: Vec<u32> = (0..tokens as u32).collect();
            let slot = |&p: &u32| table[p as usize / block_size] * block_size as u32 + p % block_size as u32;
            let slots: Vec<u32> = positions.iter().map(slot).collect();
            let call = QkvCall { shape, norm: None, rope: &no_rope, positions: &positions, slots: &slots };
            call.run(form, qkv, &mut vec![0.0; tokens * shape.q_width()], kv.layer_mut(1)).unwrap();
            tables.push(table);
        }
        Layout { tables, kv }
    }

    /// Attention of the positions `spans` names (sequence, first, end), one batch.
    fn run(&self, spans: &[(usize, usize, usize)], layout: &mut Layout, compute: Compute<'_>) -> Vec<f32> {
        let q_width = self.shape.q_width();
        let width = q_width + 2 * self.shape.kv_heads * self.shape.head_dim;
        let mut q = Vec::new();
        let mut seqs = Vec::new();
        for &(seq, first, end) in spans {
            let start = q.len() / q_width;
            (first..end).for_each(|row| q.extend_from_slice(&self.qkv[seq][row * width..][..q_width]));
            let rows = start..start + end - first;
            seqs.push(SeqSpan { rows, first_position: first as u32, block_table: &layout.tables[seq] });
        }
        // The reference adds to its output.
        let mut out = vec![0.0; q.len()];
        compute(&AttentionCall { shape: &self.shape, seqs: &seqs, kv: &layout.kv.layer_mut(1) }, &q, &mut out);
        out
    }
}

type Compute<'a> = &'a dyn Fn(&AttentionCall<'_>, &[f32], &mut [f32]);

fn check(case: &Case, toss: &mut Toss) {
    let whole: Vec<(usize, usize, usize)> =
        case.lengths.iter().enumerate().map(|(seq, &(tokens, cached))| (seq, cached, tokens)).collect();
    for form in Form::available() {
        let compute: Compute<'_> = &|call, q, out| call.run(form, q, out).unwrap();
        let mut layout = case.layout(form, 16, toss);
        let expected = case.run(&whole, &mut layout, &reference::attention);
        let [one, two, three] = pools();
        let got = one.install(|| case.run(&whole, &mut layout, compute));
        let how = format!("{form} {} {:?} {:?}", case.dtype, case.shape, case.lengths);
        // On matrix tiles queries and weights have sixteen bits; values reach 2.
        let tiles = form == Form::Amx && case.dtype == WeightDtype::BF16;
        let bound = if tiles { 2.0 * 2f32.powi(-15) } else { 2e-5 };
        assert_close(&got, &expected, |_| bound, &how);
        assert_bits(
            &three.install(|| case.run(&whole, &mut layout, compute)),
            &got,
            &format!("{how} on three threads"),
        );

        // Other block sizes, and each sequence in chunks of its own.
        for block_size in [1, 7, 32] {
            let mut layout = case.layout(form, block_size, toss);
            let how = format!("{how} in blocks of {block_size}");
            assert_bits(&case.run(&whole, &mut layout, compute), &got, &how);
            let mut parts = Vec::new();
            for &(seq, mut first, end) in &whole {
                while first < end {
                    let longest = 1 + toss.below(120);
                    let next = end.min(first + 1 + toss.below(longest));
                    let part = two.install(|| case.run(&[(seq, first, next)], &mut layout, compute));
                    parts.extend(part);
                    first = next;
                }
            }
            assert_bits(&parts, &got, &format!("{how} in chunks"));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn attention_agrees(
        seed: u64, kv_heads in 1usize..3, group in 1usize..9, head_dim in 1usize..150, dtype in dtypes(),
        window in proptest::option::of(1usize..150), sequences in 1usize..4,
    ) {
        let mut toss = Toss::new(seed);
        let heads = kv_heads * group;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { heads, kv_heads, head_dim, scale, window, clip_qkv: None };
        let lengths: Vec<(usize, usize)> = (0..sequences)
            .map(|_| {
                let tokens = 1 + toss.below(200);
                (tokens, tokens - 1 - toss.below(tokens.min(80)))
            })
            .collect();
        let width = (heads + 2 * kv_heads) * head_dim;
        let qkv = lengths.iter().map(|&(tokens, _)| toss.values(tokens * width)).collect();
        check(&Case { shape, dtype, lengths, qkv }, &mut toss);
    }
}

#[test]
fn long_prefill_with_a_window_agrees() {
    let mut toss = Toss::new(5);
    for (window, head_dim) in [(None, 64), (Some(70), 64), (Some(1), 128)] {
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim, scale: 0.125, window, clip_qkv: None };
        let qkv = vec![toss.values(400 * 8 * head_dim)];
        check(&Case { shape, dtype: WeightDtype::BF16, lengths: vec![(400, 0)], qkv }, &mut toss);
    }
}

#[test]
fn bad_tables_and_rows_are_refused() {
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 2, scale: 1.0, window: None, clip_qkv: None };
    let refuse = |seqs: &[SeqSpan<'_>]| {
        let mut kv = KvPool::new(1, 2, 4, 1, 2, WeightDtype::F32);
        let call = AttentionCall { shape: &shape, seqs, kv: &kv.layer_mut(0) };
        call.run(Form::current(), &[0.0; 6], &mut [0.0; 6]).unwrap_err().to_string()
    };
    let span = |rows, first_position, block_table| SeqSpan { rows, first_position, block_table };
    assert!(refuse(&[span(0..3, 2, &[0])]).contains("last block 1 is not below 1"));
    assert!(refuse(&[span(0..3, 2, &[0, 2])]).contains("block 2 is not below 2"));
    assert!(refuse(&[span(0..4, 0, &[0])]).contains("row 4 is not below 4"));
    assert!(refuse(&[span(0..2, 0, &[0]), span(1..3, 0, &[1])]).contains("previous span's end"));
}
