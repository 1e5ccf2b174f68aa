// Paged attention over whole contexts: a block takes 16 * M * WARPS (row, head) pairs of a sequence that share keys.
#include "attention_stages.cuh"

// Each warp takes M times 16 pairs, so that what it loads of keys and values serves M products. Shared memory: BUFFERS
// tiles, which take keys and values in turn; then, where heads are WIDE and registers few, the queries and the maxima and
// sums, each thread's own.
// `merged` f32 [items, kv_heads, M * (HD / 8 + 1), threads, 4] takes the states of earlier splits where a context has
// several; each thread reads what it wrote itself.
template <class T, unsigned HD, unsigned M, unsigned BUFFERS, bool WIDE>
__device__ __forceinline__ void attend_rows(T* out, float* merged, const T* q, const T* k, const T* v, const unsigned* words,
                                            const unsigned* items, unsigned kv_heads, unsigned group, unsigned head_dim,
                                            unsigned ld, unsigned block_size, unsigned magic, unsigned shift, float scale,
                                            unsigned window) {
  constexpr unsigned STEPS = HD / 16, PAIRS = M * LANE_PAIRS;
  DYN_SMEM(unsigned char, shared);
  T* const tiles = reinterpret_cast<T*>(shared);
  uint4* const queries = reinterpret_cast<uint4*>(shared + BUFFERS * TILE * HD * sizeof(T)) + threadIdx.x;
  float4* const states = reinterpret_cast<float4*>(queries + M * STEPS * THREADS);
  const unsigned kv_head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Item item = item_at(items, blockIdx.y);
  const PairRange block(item, item.first_pair, WARPS * PAIRS, group, window);
  const Paging paging{words, item.table, kv_heads, kv_head, head_dim, block_size, magic, shift};
  // This lane's rows of product m are pairs first + 16 m and first + 16 m + 8.
  const unsigned first = item.first_pair + warp * PAIRS + lane / 4;

  unsigned a[WIDE ? 1 : M * STEPS][4];
#pragma unroll
  for (unsigned m = 0; m < M; m++) {
    const T* from[2];
#pragma unroll
    for (unsigned i = 0; i < 2; i++) {
      const unsigned pair = first + m * 16 + i * 8;
      from[i] = pair < block.to ? q + PairPlace(item, pair, kv_head, kv_heads, group, head_dim, ld).at : nullptr;
    }
#pragma unroll
    for (unsigned step = 0; step < STEPS; step++) {
      unsigned(&to)[4] = a[WIDE ? 0 : m * STEPS + step];
      query_fragment(to, from[0], from[1], step * 16, head_dim);
      if (WIDE) queries[(m * STEPS + step) * THREADS] = make_uint4(to[0], to[1], to[2], to[3]);
    }
  }

  const unsigned first_tile = block.any.first / TILE, end_tile = (block.any.end + TILE - 1) / TILE;
  const Stages<T, HD, BUFFERS> stages{tiles, k, v, paging, block.any, end_tile};
  stages.start(first_tile);

  // Maxima of rows g and g + 8, and this lane's sums of their weights.
  float4 kept[M];
  const auto state = [&](unsigned m) -> float4& { return WIDE ? states[m * THREADS] : kept[m]; };
  float o[M][HD / 8][4];
  const auto reset = [&] {
#pragma unroll
    for (unsigned m = 0; m < M; m++) {
      state(m) = make_float4(minus_infinity(), minus_infinity(), 0.f, 0.f);
#pragma unroll
      for (unsigned n = 0; n < HD / 8; n++)
#pragma unroll
        for (unsigned i = 0; i < 4; i++) o[m][n][i] = 0.f;
    }
  };
  reset();

  for (unsigned tile = first_tile; tile < end_tile; tile++) {
    const unsigned key = tile * TILE;
    const T* stage = stages.keys(tile);
    const unsigned at_lane = opaque(lane);
    unsigned p[M][4][4];
    {
      float s[M][8][4];
#pragma unroll
      for (unsigned i = 0; i < M * 32; i++) s[i / 32][i / 4 % 8][i % 4] = 0.f;
#pragma unroll (WIDE ? 8 : STEPS)
      for (unsigned step = 0; step < STEPS; step++) {
        unsigned from[M][4];
#pragma unroll
        for (unsigned m = 0; m < M; m++) {
          if (WIDE) {
            const uint4 at = queries[(m * STEPS + step) * THREADS];
            from[m][0] = at.x, from[m][1] = at.y, from[m][2] = at.z, from[m][3] = at.w;
          } else {
#pragma unroll
            for (unsigned i = 0; i < 4; i++) from[m][i] = a[WIDE ? 0 : m * STEPS + step][i];
          }
        }
        add_scores<T, HD, M, 4>(s, from, stage, at_lane, 0, step);
      }
      const bool whole = key >= first_visible(block.any.end - 1, window) && key + TILE <= block.all.end;
#pragma unroll
      for (unsigned m = 0; m < M; m++) {
        float top[2], all[2], quarter[2];
        // Few tiles are masked: nothing is kept for them.
        const auto end_of = [&](unsigned i) {
          const Item item = item_at(items, opaque(blockIdx.y));
          const unsigned pair = item.first_pair + warp * PAIRS + lane / 4 + m * 16 + i * 8;
          return pair < item.rows * group ? item.first_position + pair / group + 1 : 0;
        };
        mask_scores(s[m], top, scale, key, whole, end_of, window);
        const float4 before = state(m);
        Running running;
        running.resume(before.x, before.y);
        running.raise(top);
        weigh<T>(p[m][0], all, s[m][0], s[m][1], running);
#pragma unroll
        for (unsigned w = 1; w < 4; w++) {
          weigh<T>(p[m][w], quarter, s[m][2 * w], s[m][2 * w + 1], running);
          all[0] = __fadd_rn(all[0], quarter[0]);
          all[1] = __fadd_rn(all[1], quarter[1]);
        }
        state(m) = make_float4(running.top[0], running.top[1], __fmaf_rn(before.z, running.decay[0], all[0]),
                               __fmaf_rn(before.w, running.decay[1], all[1]));
#pragma unroll
        for (unsigned n = 0; n < HD / 8; n++)
#pragma unroll
          for (unsigned i = 0; i < 4; i++) o[m][n][i] = __fmul_rn(o[m][n][i], running.decay[i / 2]);
      }
    }
    stage = stages.values(tile);
#pragma unroll
    for (unsigned w = 0; w < 4; w++) {
      unsigned from[M][4];
#pragma unroll
      for (unsigned i = 0; i < M * 4; i++) from[i / 4][i % 4] = p[i / 4][w][i % 4];
      add_values<T, HD, M, HD / 16>(o, from, stage, at_lane, w, 0, 1);
    }
    if ((tile + 1) % TILES_OF_SPLIT != 0 && tile + 1 != end_tile) continue;

    const bool merging = tile / TILES_OF_SPLIT != first_tile / TILES_OF_SPLIT;
    float4* const earlier = reinterpret_cast<float4*>(merged) +
                            (size_t(blockIdx.y) * kv_heads + kv_head) * (M * (HD / 8 + 1) * THREADS) + threadIdx.x;
#pragma unroll
    for (unsigned m = 0; m < M; m++) {
      float4* at = earlier + m * (HD / 8 + 1) * THREADS;
      Merge low, high;
      low.reset();
      high.reset();
      if (merging) {
        const float4 state = at[HD / 8 * THREADS];
        low.top = state.x, low.sum = state.y, high.top = state.z, high.sum = state.w;
      }
      const float4 of_split = state(m);
      low.add(of_split.x, quad_sum(of_split.z));
      high.add(of_split.y, quad_sum(of_split.w));
      if (merging) {
#pragma unroll
        for (unsigned n = 0; n < HD / 8; n++) {
          const float4 values = at[n * THREADS];
          o[m][n][0] = low.value(values.x, o[m][n][0]);
          o[m][n][1] = low.value(values.y, o[m][n][1]);
          o[m][n][2] = high.value(values.z, o[m][n][2]);
          o[m][n][3] = high.value(values.w, o[m][n][3]);
        }
      }
      if (tile + 1 != end_tile) {
        at[HD / 8 * THREADS] = make_float4(low.top, low.sum, high.top, high.sum);
#pragma unroll
        for (unsigned n = 0; n < HD / 8; n++)
          at[n * THREADS] = make_float4(o[m][n][0], o[m][n][1], o[m][n][2], o[m][n][3]);
        continue;
      }
      const Item item = item_at(items, opaque(blockIdx.y));
      const unsigned quad = opaque(lane % 4);
#pragma unroll
      for (unsigned i = 0; i < 2; i++) {
        const unsigned pair = item.first_pair + warp * PAIRS + lane / 4 + m * 16 + i * 8;
        if (pair >= item.rows * group) continue;
        const PairPlace place(item, pair, kv_head, kv_heads, group, head_dim, ld);
        const float by = inverse(i == 0 ? low.sum : high.sum);
#pragma unroll
        for (unsigned n = 0; n < HD / 8; n++) {
          const unsigned col = n * 8 + quad * 2;
          if (col >= head_dim) continue;
          *reinterpret_cast<unsigned*>(out + place.at + col) =
              pack2<T>(attended(o[m][n][2 * i], by), attended(o[m][n][2 * i + 1], by));
        }
        if (place.last) pad_row(out + place.at, kv_heads * group * head_dim, head_dim, ld, quad, 4);
      }
    }
    reset();
  }
  stages.finish();
}

#define KERNEL(T, suffix, HD, M, BUFFERS, WIDE)                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_prefill_##suffix##_##HD(                       \
      T* __restrict__ out, float* __restrict__ merged, const T* __restrict__ q, const T* __restrict__ k,               \
      const T* __restrict__ v, const unsigned* __restrict__ words, const unsigned* __restrict__ items,                 \
      unsigned kv_heads, unsigned group, unsigned head_dim, unsigned ld, unsigned block_size, unsigned magic,          \
      unsigned shift, float scale, unsigned window) {                                                                  \
    attend_rows<T, HD, M, BUFFERS, WIDE>(out, merged, q, k, v, words, items, kv_heads, group,      \
                                                             head_dim, ld, block_size, magic, shift, scale, window);   \
  }                                                                                                                    \
  EXPORT_KERNEL(attention_prefill_##suffix##_##HD)
// As `prefill_layout` in `plan.rs` says. Wide heads fill all registers; at most six words that a thread touches once a tile
// lie in local memory.
#define FOR_TYPE(T, suffix)                \
  KERNEL(T, suffix, 32, 2, 4, false)    \
  KERNEL(T, suffix, 64, 2, 4, false)    \
  KERNEL(T, suffix, 128, 2, 2, true)    \
  KERNEL(T, suffix, 256, 1, 2, true)
FOR_TYPE(bf16, bf16)
FOR_TYPE(f16, f16)
#undef FOR_TYPE
#undef KERNEL
