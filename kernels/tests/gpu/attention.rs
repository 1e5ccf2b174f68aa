use moetrail_kernels::gpu::{
    ATTENTION_SPLIT, Arena, AttentionPlan, DecodeBucket, DeviceBuffer, DeviceKv, DeviceRows, Gpu, attention_splits,
    paged_attention,
};
use moetrail_kernels::{
    AttentionCall, AttentionShape, Form, KvPool, QkvCall, RopeTable, SeqSpan, WeightDtype, reference,
};
use proptest::prelude::*;

use crate::device::{assert_close, gpu, half_ulp, operand, operand_of, round};
use crate::toss::{Toss, dtypes};

/// Several sequences whose queries, keys and values for all positions are known.
struct Case {
    shape: AttentionShape,
    dtype: WeightDtype,
    /// Tokens of each sequence.
    tokens: Vec<usize>,
    /// For each sequence `[tokens, (heads + 2 kv_heads) * head_dim]`, as the dtype holds them.
    qkv: Vec<Vec<f32>>,
}

/// One layout of the cache: a block size and where each sequence's blocks lie.
struct Layout {
    tables: Vec<Vec<u32>>,
    pool: KvPool,
    kv: DeviceKv,
}

/// Rows `first..end` of a sequence.
type Part = (usize, usize, usize);

impl Case {
    fn new(toss: &mut Toss, shape: AttentionShape, dtype: WeightDtype, tokens: Vec<usize>) -> Case {
        let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        let values = |&tokens: &usize| (0..tokens * width).map(|_| round(toss.value(), dtype)).collect();
        let qkv = tokens.iter().map(values).collect();
        Case { shape, dtype, tokens, qkv }
    }

    /// The same with other values.
    fn with_values(&self, change: impl Fn(f32) -> f32) -> Case {
        let (q_width, kv_width) = (self.shape.q_width(), self.shape.kv_heads * self.shape.head_dim);
        let mut qkv = self.qkv.clone();
        for row in qkv.iter_mut().flat_map(|rows| rows.chunks_mut(q_width + 2 * kv_width)) {
            row[q_width + kv_width..].iter_mut().for_each(|value| *value = change(*value));
        }
        Case { shape: self.shape, dtype: self.dtype, tokens: self.tokens.clone(), qkv }
    }

    /// Everything that no token was written to is NaN.
    fn layout(&self, gpu: &Gpu, block_size: usize, toss: &mut Toss) -> Layout {
        let blocks = self.tokens.iter().map(|tokens| tokens.div_ceil(block_size)).sum::<usize>() + 3;
        let mut free = toss.permutation(blocks);
        let shape = &self.shape;
        let mut pool = KvPool::new(2, blocks, block_size, shape.kv_heads, shape.head_dim, self.dtype);
        let mut bytes = vec![0xff; pool.bytes() / blocks];
        (0..blocks).for_each(|block| pool.write_block(block as u32, &bytes));
        let no_rope = RopeTable::new(vec![], 1.0, 100_000);
        let mut tables = Vec::new();
        for (&tokens, qkv) in self.tokens.iter().zip(&self.qkv) {
            let table: Vec<u32> = free.drain(..tokens.div_ceil(block_size)).map(|block| block as u32).collect();
            let positions: Vec<u32> = (0..tokens as u32).collect();
            let slot = |&p: &u32| table[p as usize / block_size] * block_size as u32 + p % block_size as u32;
            let slots: Vec<u32> = positions.iter().map(slot).collect();
            let call = QkvCall { shape, norm: None, rope: &no_rope, positions: &positions, slots: &slots };
            call.run(Form::current(), qkv, &mut vec![0.0; tokens * shape.q_width()], pool.layer_mut(1)).unwrap();
            tables.push(table);
        }
        let kv = DeviceKv::new(gpu, 2, blocks, block_size, shape.kv_heads, shape.head_dim, self.dtype).unwrap();
        for block in 0..blocks as u32 {
            pool.read_block(block, &mut bytes);
            kv.write_block(block, &bytes).unwrap();
        }
        Layout { tables, pool, kv }
    }

    fn queries(&self, parts: &[Part]) -> Vec<f32> {
        let q_width = self.shape.q_width();
        let width = q_width + 2 * self.shape.kv_heads * self.shape.head_dim;
        let rows = parts.iter().flat_map(|&(seq, first, end)| (first..end).map(move |row| (seq, row)));
        rows.flat_map(|(seq, row)| self.qkv[seq][row * width..][..q_width].to_vec()).collect()
    }

    fn expected(&self, parts: &[Part], layout: &mut Layout) -> Vec<f32> {
        let q = self.queries(parts);
        let mut out = vec![0.0; q.len()];
        let kv = layout.pool.layer_mut(1);
        let call = AttentionCall { shape: &self.shape, seqs: &spans(parts, &layout.tables), kv: &kv };
        reference::attention(&call, &q, &mut out);
        out
    }

    /// As one step of any rows.
    fn run(&self, arena: &Arena, parts: &[Part], layout: &Layout) -> Vec<f32> {
        let plan = AttentionPlan::new(&self.shape, &layout.kv, &spans(parts, &layout.tables)).unwrap();
        self.attend(arena, &self.queries(parts), &plan, layout)
    }

    /// As one step of single rows, padded; without the padding, which is zero.
    fn decode(&self, arena: &Arena, parts: &[Part], layout: &Layout, bucket: &DecodeBucket) -> Vec<f32> {
        let spans = spans(parts, &layout.tables);
        let plan = AttentionPlan::decode(&self.shape, &layout.kv, &spans, bucket).unwrap();
        let mut q = self.queries(parts);
        let named = q.len();
        q.resize(bucket.seqs * self.shape.q_width(), 1.0);
        let mut out = self.attend(arena, &q, &plan, layout);
        assert!(out.drain(named..).all(|value| value == 0.0), "padded rows are zero");
        out
    }

    fn attend(&self, arena: &Arena, q: &[f32], plan: &AttentionPlan, layout: &Layout) -> Vec<f32> {
        let q = operand_of(arena, q, self.shape.q_width(), self.dtype);
        let words = DeviceBuffer::of(arena.gpu(), plan.words()).unwrap();
        let out: DeviceRows = paged_attention(arena, &q, &self.shape, plan, words.address(), &layout.kv, 1).unwrap();
        operand(arena.gpu(), &out)
    }

    /// Whether weights are rounded before they multiply values.
    fn on_tensor_cores(&self) -> bool {
        self.dtype != WeightDtype::F32 && self.shape.head_dim.is_multiple_of(8) && self.shape.head_dim <= 256
    }
}

fn spans<'a>(parts: &[Part], tables: &'a [Vec<u32>]) -> Vec<SeqSpan<'a>> {
    let mut next = 0;
    let span = |&(seq, first, end): &Part| {
        let rows = next..next + end - first;
        next = rows.end;
        SeqSpan { rows, first_position: first as u32, block_table: &tables[seq] }
    };
    parts.iter().map(span).collect()
}

fn assert_bits(got: &[f32], expected: &[f32], what: &str) {
    let differs = got.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!((got.len(), differs), (expected.len(), None), "{what}");
}

/// Rows `cached..` of each sequence: in one step, against the reference; in steps of other rows and in other blocks, bit
/// by bit.
fn check(gpu: &Gpu, case: &Case, cached: &[usize], block_sizes: [usize; 2], toss: &mut Toss) {
    let arena = Arena::new(gpu);
    let q_width = case.shape.q_width();
    let whole: Vec<Part> = case.tokens.iter().zip(cached).enumerate().map(|(seq, (&t, &c))| (seq, c, t)).collect();
    let how = format!("{} {:?} {:?} {cached:?} {block_sizes:?}", case.dtype, case.shape, case.tokens);
    let mut layout = case.layout(gpu, block_sizes[0], toss);
    let expected = case.expected(&whole, &mut layout);
    // The same weights times the sizes of the values: what relative errors of the weights may amount to.
    let absolute = case.with_values(f32::abs);
    let absolute = absolute.expected(&whole, &mut absolute.layout(gpu, block_sizes[0], toss));
    let unit = half_ulp(case.dtype);
    let weights = if case.on_tensor_cores() { unit } else { 0.0 };
    // Scores are sums of head_dim products, exponentials are good to two units, sums of weights are of one sign.
    let single = 1.5e-5;
    let got = case.run(&arena, &whole, &layout);
    let bound = |i: usize| (weights + single) * absolute[i] * (1.0 + unit) + unit * expected[i].abs() + 1e-30;
    assert_close(&got, &expected, bound, &how);

    let layout = case.layout(gpu, block_sizes[1], toss);
    let mut chunks = Vec::new();
    for &(seq, mut first, end) in &whole {
        while first < end {
            let longest = 1 + toss.below(end - first);
            let next = first + 1 + toss.below(longest);
            chunks.extend(case.run(&arena, &[(seq, first, next)], &layout));
            first = next;
        }
    }
    assert_bits(&chunks, &got, &format!("{how} in chunks"));

    // Some row of each sequence, as a step of single rows.
    let (mut single, mut rows, mut start) = (Vec::new(), Vec::new(), 0);
    for &(seq, first, end) in &whole {
        let row = first + toss.below(end - first);
        single.push((seq, row, row + 1));
        rows.extend_from_slice(&got[(start + row - first) * q_width..][..q_width]);
        start += end - first;
    }
    let seqs = whole.len() + toss.below(3);
    let context = case.tokens.iter().max().unwrap() + toss.below(700);
    let mut bucket = DecodeBucket::new(&case.shape, seqs, context);
    let out = case.decode(&arena, &single, &layout, &bucket);
    assert_bits(&out, &rows, &format!("{how}: {single:?} of {bucket:?}"));
    // As few splits as there are.
    let needed: usize = single.iter().map(|&(_, _, end)| attention_splits(&case.shape, end)).sum();
    bucket.splits = needed + seqs - whole.len();
    let out = case.decode(&arena, &single, &layout, &bucket);
    assert_bits(&out, &rows, &format!("{how}: {single:?} of {bucket:?}"));
}

fn shape(kv_heads: usize, group: usize, head_dim: usize, window: Option<usize>) -> AttentionShape {
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttentionShape { heads: kv_heads * group, kv_heads, head_dim, scale, window, clip_qkv: None }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(28))]

    #[test]
    fn attention_agrees(
        seed: u64, kv_heads in 1usize..3, group in prop_oneof![1usize..10, Just(16), Just(21)], dtype in dtypes(),
        head_dim in prop_oneof![Just(8usize), Just(16), Just(32), Just(40), Just(64), 1usize..40],
        window in proptest::option::of(1usize..150), sequences in 1usize..4, block_sizes in [1usize..34, 1usize..34],
    ) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let mut toss = Toss::new(seed);
        let tokens: Vec<usize> = (0..sequences).map(|_| 1 + toss.below(180)).collect();
        let cached: Vec<usize> = tokens.iter().map(|&tokens| tokens - 1 - toss.below(tokens.min(30))).collect();
        let case = Case::new(&mut toss, shape(kv_heads, group, head_dim, window), dtype, tokens);
        check(&gpu, &case, &cached, block_sizes, &mut toss);
    }
}

#[test]
fn contexts_of_several_splits_agree() {
    let Some(gpu) = gpu(7) else { return };
    let mut toss = Toss::new(7);
    for (dtype, group, head_dim, window) in
        [(WeightDtype::BF16, 2, 16, None), (WeightDtype::F16, 3, 32, Some(600)), (WeightDtype::F32, 2, 6, Some(1025))]
    {
        let tokens = vec![2 * ATTENTION_SPLIT + 75, ATTENTION_SPLIT + 20];
        let case = Case::new(&mut toss, shape(1, group, head_dim, window), dtype, tokens.clone());
        let cached = [tokens[0] - 60, tokens[1] - 45];
        check(&gpu, &case, &cached, [16, 7], &mut toss);
    }
}

#[test]
fn wide_heads_agree() {
    let Some(gpu) = gpu(8) else { return };
    let mut toss = Toss::new(8);
    for (dtype, head_dim, tokens) in
        [(WeightDtype::BF16, 128, 150), (WeightDtype::F16, 256, 100), (WeightDtype::BF16, 200, ATTENTION_SPLIT + 30)]
    {
        let case = Case::new(&mut toss, shape(1, 4, head_dim, None), dtype, vec![tokens]);
        check(&gpu, &case, &[tokens - 18], [16, 5], &mut toss);
    }
}

#[test]
fn a_recorded_step_serves_other_contexts() {
    let Some(gpu) = gpu(9) else { return };
    let mut toss = Toss::new(9);
    let shape = shape(2, 2, 16, None);
    let case = Case::new(&mut toss, shape, WeightDtype::BF16, vec![ATTENTION_SPLIT + 40, 70, 33]);
    let layout = case.layout(&gpu, 8, &mut toss);
    let arena = Arena::new(&gpu);
    let bucket = DecodeBucket::new(&shape, 4, 600);
    let plan =
        |parts: &[Part]| AttentionPlan::decode(&shape, &layout.kv, &spans(parts, &layout.tables), &bucket).unwrap();
    let empty = plan(&[]);
    let words = DeviceBuffer::of(&gpu, empty.words()).unwrap();
    let q = operand_of(&arena, &vec![0.0; 4 * shape.q_width()], shape.q_width(), case.dtype);
    gpu.driver().begin_graph().unwrap();
    let out = paged_attention(&arena, &q, &shape, &empty, words.address(), &layout.kv, 1).unwrap();
    let graph = gpu.driver().end_graph().unwrap();
    for parts in
        [vec![(0, 540, 541), (1, 60, 61)], vec![(2, 0, 1)], vec![(1, 69, 70), (0, 511, 512), (2, 5, 6), (0, 512, 513)]]
    {
        let plan = plan(&parts);
        assert_eq!((plan.launches(), plan.words().len()), (empty.launches(), empty.words().len()));
        let le = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        gpu.upload(words.address(), &le(plan.words())).unwrap();
        let mut queries = case.queries(&parts);
        queries.resize(4 * shape.q_width(), 0.0);
        let bytes: Vec<u32> =
            queries.chunks(2).map(|pair| (pair[0].to_bits() >> 16) | (pair[1].to_bits() & 0xffff_0000)).collect();
        gpu.upload(q.address(), &le(&bytes)).unwrap();
        gpu.driver().launch_graph(graph).unwrap();
        let got = operand(&gpu, &out);
        let alone: Vec<f32> = parts.iter().flat_map(|&part| case.run(&arena, &[part], &layout)).collect();
        assert_bits(&got[..alone.len()], &alone, "replayed");
        assert!(got[alone.len()..].iter().all(|&value| value == 0.0), "padded rows are zero");
    }
    gpu.driver().drop_graph(graph);
}

#[test]
fn bad_tables_rows_and_plans_are_refused() {
    let Some(gpu) = gpu(0) else { return };
    let shape = shape(1, 1, 2, None);
    let kv = DeviceKv::new(&gpu, 1, 2, 4, 1, 2, WeightDtype::F32).unwrap();
    let refuse = |seqs: &[SeqSpan<'_>]| AttentionPlan::new(&shape, &kv, seqs).unwrap_err().to_string();
    let span = |rows, first_position, block_table| SeqSpan { rows, first_position, block_table };
    assert!(refuse(&[span(0..3, 2, &[0])]).contains("last block 1 is not below 1"));
    assert!(refuse(&[span(0..3, 2, &[0, 2])]).contains("block 2 is not below 2"));
    assert!(refuse(&[span(0..2, 0, &[0]), span(1..3, 0, &[1])]).contains("previous span's end"));
    let refuse =
        |seqs: &[SeqSpan<'_>], bucket| AttentionPlan::decode(&shape, &kv, seqs, &bucket).unwrap_err().to_string();
    let bucket = DecodeBucket { seqs: 2, context: 4, splits: 2 };
    assert!(refuse(&[span(0..2, 0, &[0])], bucket).contains("rows of a sequence"));
    assert!(refuse(&[span(0..1, 4, &[0, 1])], bucket).contains("position 4 is not below 4"));
    assert!(refuse(&[span(0..1, 0, &[0])], DecodeBucket { splits: 1, ..bucket }).contains("splits of all sequences 2"));
    assert!(refuse(&[span(0..1, 0, &[0])], DecodeBucket { seqs: 0, ..bucket }).contains("sequences 1 is not below 1"));

    let arena = Arena::new(&gpu);
    let plan = AttentionPlan::new(&shape, &kv, &[span(0..2, 0, &[0])]).unwrap();
    let words = DeviceBuffer::of(&gpu, plan.words()).unwrap();
    let refuse = |rows: usize, width: usize, layer: usize, shape: &AttentionShape| {
        let q = operand_of(&arena, &vec![0.0; rows * width], width, WeightDtype::F32);
        paged_attention(&arena, &q, shape, &plan, words.address(), &kv, layer).unwrap_err().to_string()
    };
    assert!(refuse(1, 2, 0, &shape).contains("row 2 is not below 2"));
    assert!(refuse(2, 3, 0, &shape).contains("q is [3, 32, 4]"));
    assert!(refuse(2, 2, 1, &shape).contains("layer 1 is not below 1"));
    assert!(refuse(2, 2, 0, &AttentionShape { window: Some(3), ..shape }).contains("planned shape"));
}
