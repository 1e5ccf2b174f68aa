// Paged attention of few rows over long contexts: a block takes up to 16 (row, head) pairs and one split of the context.
#include "attention_stages.cuh"

// Four warps share each tile: warp w scores its keys 16 w to 16 w + 15, and adds up elements 16 w, 16 (w + 4), ... of the
// head, from the weights of all four. An entry of the plan is (item, split). The partial state of a pair is f32
// [head_dim] values, their maximum and their sum, at [entry, kv_heads, pairs, head_dim + 2].
template <class T, unsigned HD, unsigned BUFFERS>
__device__ __forceinline__ void attend_split(T* out, float* partial, const T* q, const T* k, const T* v, const unsigned* words,
                                             const unsigned* items, const unsigned* entries, unsigned kv_heads, unsigned group,
                                             unsigned head_dim, unsigned ld, unsigned block_size, unsigned magic,
                                             unsigned shift, float scale, unsigned window, unsigned pairs) {
  constexpr unsigned STEPS = HD / 16, PARTS = (STEPS + WARPS - 1) / WARPS;
  __shared__ uint4 weights[WARPS][32];
  __shared__ float2 quarters[WARPS][32];
  __shared__ float tops[WARPS][LANE_PAIRS];
  DYN_SMEM(T, tiles);

  const unsigned kv_head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const unsigned index = entries[2 * size_t(blockIdx.y)], split = entries[2 * size_t(blockIdx.y) + 1];
  if (index == NO_ROW) return;
  const Item item = item_at(items, index);
  const PairRange own(item, item.first_pair, LANE_PAIRS, group, window);
  const Paging paging{words, item.table, kv_heads, kv_head, head_dim, block_size, magic, shift};

  unsigned a[STEPS][1][4];
  unsigned ends[2];
  {
    const T* from[2];
#pragma unroll
    for (unsigned i = 0; i < 2; i++) {
      const unsigned pair = item.first_pair + g + i * 8;
      ends[i] = pair < own.to ? item.first_position + pair / group + 1 : 0;
      from[i] = pair < own.to ? q + PairPlace(item, pair, kv_head, kv_heads, group, head_dim, ld).at : nullptr;
    }
#pragma unroll
    for (unsigned step = 0; step < STEPS; step++) query_fragment(a[step][0], from[0], from[1], step * 16, head_dim);
  }

  const unsigned first_tile = max(own.any.first / TILE, split * TILES_OF_SPLIT);
  const unsigned end_tile = min((own.any.end + TILE - 1) / TILE, (split + 1) * TILES_OF_SPLIT);
  const Stages<T, HD, BUFFERS> stages{tiles, k, v, paging, own.any, end_tile};
  stages.start(first_tile);

  Running running;
  float o[1][2 * PARTS][4], sum[2] = {0.f, 0.f};
  running.reset();
#pragma unroll
  for (unsigned i = 0; i < 8 * PARTS; i++) o[0][i / 4][i % 4] = 0.f;

  for (unsigned tile = first_tile; tile < end_tile; tile++) {
    const unsigned key = tile * TILE;
    const T* stage = stages.keys(tile);
    float s[1][2][4] = {{{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}}}, top[2];
#pragma unroll
    for (unsigned step = 0; step < STEPS; step++) add_scores<T, HD, 1, 1>(s, a[step], stage, lane, warp * 16, step);
    const bool whole = key >= own.all.first && key + TILE <= own.all.end;
    mask_scores(s[0], top, scale, key + warp * 16, whole, [&](unsigned i) { return ends[i]; }, window);
    // `tops` of the tile before was read before the barrier of its values.
    if (lane % 4 == 0) {
      tops[warp][g] = top[0];
      tops[warp][g + 8] = top[1];
    }
    __syncthreads();
#pragma unroll
    for (unsigned i = 0; i < 2; i++)
      top[i] = fmaxf(fmaxf(tops[0][g + i * 8], tops[1][g + i * 8]), fmaxf(tops[2][g + i * 8], tops[3][g + i * 8]));
    running.raise(top);
    unsigned p[4];
    float quarter[2];
    weigh<T>(p, quarter, s[0][0], s[0][1], running);
    // What the tile before left here was read before the barrier above.
    weights[warp][lane] = make_uint4(p[0], p[1], p[2], p[3]);
    quarters[warp][lane] = make_float2(quarter[0], quarter[1]);
#pragma unroll
    for (unsigned i = 0; i < 8 * PARTS; i++) o[0][i / 4][i % 4] = __fmul_rn(o[0][i / 4][i % 4], running.decay[i % 4 / 2]);
    stage = stages.values(tile);
    float2 all = quarters[0][lane];
#pragma unroll
    for (unsigned w = 1; w < WARPS; w++) {
      all.x = __fadd_rn(all.x, quarters[w][lane].x);
      all.y = __fadd_rn(all.y, quarters[w][lane].y);
    }
    sum[0] = __fmaf_rn(sum[0], running.decay[0], all.x);
    sum[1] = __fmaf_rn(sum[1], running.decay[1], all.y);
    if (warp < STEPS) {
#pragma unroll
      for (unsigned w = 0; w < WARPS; w++) {
        const uint4 at = weights[w][lane];
        const unsigned from[1][4] = {{at.x, at.y, at.z, at.w}};
        add_values<T, HD, 1, PARTS>(o, from, stage, lane, w, warp, WARPS);
      }
    }
  }
  stages.finish();

  // Every warp has the sums of all.
  sum[0] = quad_sum(sum[0]);
  sum[1] = quad_sum(sum[1]);
  if (warp >= STEPS) return;
#pragma unroll
  for (unsigned i = 0; i < 2; i++) {
    const unsigned r = g + i * 8, pair = item.first_pair + r;
    // The one row of padding has pairs too, which see nothing.
    if (r >= pairs || pair >= max(item.rows, 1u) * group) continue;
    const PairPlace place(item, pair, kv_head, kv_heads, group, head_dim, ld);
    const float by = inverse(sum[i]);
    float* to = partial + ((size_t(blockIdx.y) * kv_heads + kv_head) * pairs + r) * (head_dim + 2);
    if (item.splits != 1 && warp == 0 && lane % 4 == 0) {
      to[head_dim] = running.top[i];
      to[head_dim + 1] = sum[i];
    }
#pragma unroll
    for (unsigned n = 0; n < 2 * PARTS; n++) {
      const unsigned col = ((n / 2 * WARPS + warp) * 2 + n % 2) * 8 + lane % 4 * 2;
      if (col >= head_dim) continue;
      if (item.splits == 1) {
        *reinterpret_cast<unsigned*>(out + place.at + col) = pack2<T>(attended(o[0][n][2 * i], by), attended(o[0][n][2 * i + 1], by));
      } else {
        *reinterpret_cast<float2*>(to + col) = make_float2(o[0][n][2 * i], o[0][n][2 * i + 1]);
      }
    }
    if (item.splits == 1 && place.last && warp == 0)
      pad_row(out + place.at, kv_heads * group * head_dim, head_dim, ld, lane % 4, 4);
  }
}

// Merges the partial states of an item that has several.
template <class T>
__device__ __forceinline__ void combine(T* out, const float* partial, const unsigned* items, unsigned kv_heads, unsigned group,
                                        unsigned head_dim, unsigned ld, unsigned pairs) {
  const unsigned kv_head = blockIdx.x;
  const Item item = item_at(items, blockIdx.y);
  if (item.splits <= 1) return;
  const unsigned all = item.rows * group - item.first_pair, count = all < pairs ? all : pairs;
  const size_t stride = size_t(kv_heads) * pairs * (head_dim + 2);
  partial += (size_t(item.first_partial) * kv_heads + kv_head) * pairs * (head_dim + 2);
  for (unsigned at = threadIdx.x; at < count * head_dim; at += blockDim.x) {
    const unsigned r = at / head_dim, col = at % head_dim;
    const float* from = partial + r * (head_dim + 2);
    Merge merge;
    merge.reset();
    float value = 0.f;
    for (unsigned split = 0; split < item.splits; split++, from += stride) {
      merge.add(from[head_dim], from[head_dim + 1]);
      value = merge.value(value, from[col]);
    }
    const PairPlace place(item, item.first_pair + r, kv_head, kv_heads, group, head_dim, ld);
    out[place.at + col] = from_float<T>(attended(value, inverse(merge.sum)));
    if (place.last && col == 0) pad_row(out + place.at, kv_heads * group * head_dim, head_dim, ld, 0, 1);
  }
}

#define KERNEL(T, suffix, HD, BUFFERS, BLOCKS)                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_split_##suffix##_##HD(                       \
      T* __restrict__ out, float* __restrict__ partial, const T* __restrict__ q, const T* __restrict__ k,              \
      const T* __restrict__ v, const unsigned* __restrict__ words, const unsigned* __restrict__ items,                 \
      const unsigned* __restrict__ entries, unsigned kv_heads, unsigned group, unsigned head_dim, unsigned ld,         \
      unsigned block_size, unsigned magic, unsigned shift, float scale, unsigned window, unsigned pairs) {             \
    attend_split<T, HD, BUFFERS>(out, partial, q, k, v, words, items, entries, kv_heads, group, head_dim, ld,          \
                                 block_size, magic, shift, scale, window, pairs);                                      \
  }                                                                                                                    \
  EXPORT_KERNEL(attention_split_##suffix##_##HD)
#define FOR_TYPE(T, suffix)                                                                                            \
  KERNEL(T, suffix, 32, 4, 4)                                                                                          \
  KERNEL(T, suffix, 64, 4, 4)                                                                                          \
  KERNEL(T, suffix, 128, 4, 3)                                                                                         \
  KERNEL(T, suffix, 256, 3, 2)                                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS) attention_combine_##suffix(                                    \
      T* __restrict__ out, const float* __restrict__ partial, const unsigned* __restrict__ items, unsigned kv_heads,   \
      unsigned group, unsigned head_dim, unsigned ld, unsigned pairs) {                                                \
    combine<T>(out, partial, items, kv_heads, group, head_dim, ld, pairs);                                             \
  }                                                                                                                    \
  EXPORT_KERNEL(attention_combine_##suffix)
FOR_TYPE(bf16, bf16)
FOR_TYPE(f16, f16)
#undef FOR_TYPE
#undef KERNEL
