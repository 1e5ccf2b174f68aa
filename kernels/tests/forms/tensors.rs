//! The candle-level functions: the slices' results in tensors, and refusals that name what is wrong.

use candle_core::{DType, Device, Tensor};
use moetrail_kernels::{
    AttentionShape, ExpertMatrix, Form, KvPool, Linear, PackedExperts, RopeTable, Routing, RowMarks, SeqSpan,
    WeightDtype, WeightView, embedding, expert_ffn, linear, paged_attention, qkv_rope_store, rms_norm, silu_and_mul,
};

use crate::rows::assert_bits;
use crate::toss::{Toss, le_bytes};

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn linear_takes_any_strides() {
    let mut toss = Toss::new(1);
    let (n, ins, outs) = (5, 12, 70);
    let weight = toss.matrix(outs, ins, WeightDtype::BF16);
    let bias = toss.values(outs);
    let x = toss.values(n * ins);
    let mut expected = vec![0.0; n * outs];
    linear(Form::current(), &x, &weight, Some(&bias), &mut expected);
    let layer = Linear::new(weight, Some(bias));
    let x = Tensor::from_vec(x, (n, ins), &Device::Cpu).unwrap();
    assert_bits(&values(&layer.forward(&x).unwrap()), &expected, "contiguous");
    let turned = x.t().unwrap().contiguous().unwrap().t().unwrap();
    assert_bits(&values(&layer.forward(&turned).unwrap()), &expected, "transposed in memory");
    let rest = layer.forward(&x.narrow(0, 2, 3).unwrap()).unwrap();
    assert_bits(&values(&rest), &expected[2 * outs..], "a part of a larger tensor");
    assert_eq!(layer.forward(&x.narrow(0, 0, 0).unwrap()).unwrap().dims(), [0, outs]);

    let error = layer.forward(&x.narrow(1, 0, 11).unwrap()).unwrap_err().to_string();
    assert!(error.contains("linear: x is [5, 11], expected [5, 12]"), "{error}");
    layer.forward(&x.to_dtype(DType::F64).unwrap()).unwrap_err();
}

#[test]
fn embedding_looks_up_rows() {
    let table = Toss::new(2).matrix(100, 7, WeightDtype::F16);
    let got = embedding(&table, &[99, 3, 3], &Device::Cpu).unwrap();
    assert_eq!(got.dims(), [3, 7]);
    let mut expected = vec![0.0; 21];
    for (row, id) in expected.chunks_mut(7).zip([99, 3, 3]) {
        table.unpack_row(id, row);
    }
    assert_eq!(values(&got), expected);
    let error = embedding(&table, &[100], &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("token id 100 is not below 100"), "{error}");
}

#[test]
fn norm_and_activation_refuse_other_widths() {
    let x = Tensor::ones((2, 6), DType::F32, &Device::Cpu).unwrap();
    let weight = Tensor::ones(6, DType::F32, &Device::Cpu).unwrap();
    let got = values(&rms_norm(&x, &weight, 0.0).unwrap());
    assert_eq!(got, [1.0; 12]);
    rms_norm(&x, &weight.narrow(0, 0, 5).unwrap(), 0.0).unwrap_err();
    assert_eq!(silu_and_mul(&x).unwrap().dims(), [2, 3]);
    silu_and_mul(&x.narrow(1, 0, 5).unwrap()).unwrap_err();
}

/// One token attends to itself alone: the output is its value, through store, cache and block table.
#[test]
fn a_first_token_gets_its_own_value_back() {
    let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 8, scale: 1.0, window: None, clip_qkv: None };
    let mut kv = KvPool::new(2, 3, 4, 2, 8, WeightDtype::F32);
    let qkv = Toss::new(3).values(64);
    let x = Tensor::from_vec(qkv.clone(), (1, 64), &Device::Cpu).unwrap();
    let rope = RopeTable::new(vec![1.0; 4], 1.0, 16);
    let q = qkv_rope_store(&x, &shape, None, &rope, &[0], &[8], kv.layer_mut(1)).unwrap();
    assert_eq!(values(&q), qkv[..32], "position 0 is not rotated");
    let seq = SeqSpan { rows: 0..1, first_position: 0, block_table: &[2] };
    let out = values(&paged_attention(&q, &shape, &[seq], kv.layer_mut(1)).unwrap());
    let (first, second) = (&qkv[48..56], &qkv[56..]);
    assert_eq!(out, [first, first, second, second].concat());
}

#[test]
fn a_batch_without_rows_gives_no_rows() {
    let experts = {
        let mut builder = PackedExperts::builder(1, 4, 2, WeightDtype::F32, WeightDtype::F32);
        let bytes = le_bytes(&[1.0; 8]);
        builder.put(0, ExpertMatrix::Gate, WeightView::row_major(&bytes, WeightDtype::F32, 2, 4)).unwrap();
        builder.finish()
    };
    let empty = |width: usize, dtype| Tensor::zeros((0, width), dtype, &Device::Cpu).unwrap();
    let routing =
        Routing { topk_ids: empty(1, DType::U32), topk_weights: empty(1, DType::F32), marks: RowMarks::default() };
    assert_eq!(expert_ffn(&empty(4, DType::F32), &routing, &experts).unwrap().dims(), [0, 4]);
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 4, scale: 1.0, window: None, clip_qkv: None };
    let mut kv = KvPool::new(1, 1, 4, 1, 4, WeightDtype::BF16);
    let out = paged_attention(&empty(4, DType::F32), &shape, &[], kv.layer_mut(0)).unwrap();
    assert_eq!(out.dims(), [0, 4]);
}
