// Paged attention over whole contexts: a block takes 16 * WARPS (row, head) pairs of a sequence that share keys.
#include "attention.cuh"

// Shared memory: BUFFERS tiles, which take keys and values in turn; where HD is too wide for the registers, the queries;
// where a context has several splits, the merged values of those before (each thread's own, so no barrier guards them).
template <class T, unsigned HD, unsigned WARPS, unsigned BUFFERS>
__device__ __forceinline__ void attend_rows(T* out, const T* q, const T* k, const T* v, const unsigned* words,
                                            const unsigned* items, unsigned kv_heads, unsigned group, unsigned head_dim,
                                            unsigned ld, unsigned block_size, unsigned magic, unsigned shift, float scale,
                                            unsigned window) {
  constexpr unsigned THREADS = WARPS * 32, STEPS = HD / 16;
  constexpr bool QUERIES_IN_SHARED = HD > 128;
  DYN_SMEM(unsigned char, shared);
  T* const tiles = reinterpret_cast<T*>(shared);
  uint4* const queries = reinterpret_cast<uint4*>(shared + BUFFERS * TILE * HD * sizeof(T)) + threadIdx.x;
  float* const merged = reinterpret_cast<float*>(shared + BUFFERS * TILE * HD * sizeof(T) +
                                                 (QUERIES_IN_SHARED ? STEPS * THREADS * sizeof(uint4) : 0)) + threadIdx.x;

  const unsigned kv_head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const Item item = item_at(items, blockIdx.y);
  const Visible block = PairRange(item, item.first_pair, WARPS * LANE_PAIRS, group, window).any;
  const PairRange own(item, item.first_pair + warp * LANE_PAIRS, LANE_PAIRS, group, window);
  const Paging paging{words + item.table, kv_heads, kv_head, head_dim, block_size, magic, shift};

  unsigned a[QUERIES_IN_SHARED ? 1 : STEPS][4];
  Visible rows[2];
  {
    const T* from[2];
#pragma unroll
    for (unsigned i = 0; i < 2; i++) {
      const unsigned pair = item.first_pair + warp * LANE_PAIRS + g + i * 8;
      rows[i] = PairRange(item, pair, 1, group, window).any;
      from[i] = pair < own.to ? q + PairPlace(item, pair, kv_head, kv_heads, group, head_dim, ld).at : nullptr;
    }
#pragma unroll
    for (unsigned step = 0; step < STEPS; step++) {
      unsigned(&to)[4] = a[QUERIES_IN_SHARED ? 0 : step];
      query_fragment(to, from[0], from[1], step * 16, head_dim);
      if (QUERIES_IN_SHARED) queries[step * THREADS] = make_uint4(to[0], to[1], to[2], to[3]);
    }
  }

  const unsigned first_tile = block.first / TILE, end_tile = (block.end + TILE - 1) / TILE;
  const unsigned last_stage = 2 * end_tile;
  // Stages count absolutely: 2 tile for the keys, 2 tile + 1 for the values. Each stage commits one group.
  const auto load = [&](unsigned stage, unsigned buffer) {
    if (stage < last_stage)
      load_tile<T, HD, THREADS>(tiles + buffer * TILE * HD, stage % 2 == 0 ? k : v, stage / 2, paging, block);
    cp_async_commit();
  };
#pragma unroll
  for (unsigned i = 0; i + 1 < BUFFERS; i++) load(2 * first_tile + i, i);
  unsigned buffer = 0;
  // Waits for a stage and starts another in the buffer of the stage before it: behind the barrier every thread has done
  // with that one, and sees what all threads copied for this one.
  const auto next_stage = [&](unsigned stage) {
    cp_async_wait<BUFFERS - 2>();
    __syncthreads();
    load(stage + BUFFERS - 1, buffer == 0 ? BUFFERS - 1 : buffer - 1);
    const T* tile = tiles + buffer * TILE * HD;
    buffer = buffer + 1 == BUFFERS ? 0 : buffer + 1;
    return tile;
  };

  Running running;
  Merge merge[2];
  float o[HD / 8][4], sum[2];
  bool merging = false;
  const auto reset = [&] {
    running.reset();
#pragma unroll
    for (unsigned n = 0; n < HD / 8; n++)
#pragma unroll
      for (unsigned i = 0; i < 4; i++) o[n][i] = 0.f;
    sum[0] = sum[1] = 0.f;
  };
  reset();
  merge[0].reset();
  merge[1].reset();

  for (unsigned tile = first_tile; tile < end_tile; tile++) {
    const unsigned key = tile * TILE;
    // A tile of which none of the warp's pairs sees anything would leave all as it is.
    const bool seen = key < own.any.end && key + TILE > own.any.first;
    const T* stage = next_stage(2 * tile);
    unsigned p[4][4];
    if (seen) {
      float s[8][4], top[2];
#pragma unroll
      for (unsigned i = 0; i < 32; i++) s[i / 4][i % 4] = 0.f;
#pragma unroll (QUERIES_IN_SHARED ? 4 : STEPS)
      for (unsigned step = 0; step < STEPS; step++) {
        if (QUERIES_IN_SHARED) {
          const uint4 at = queries[step * THREADS];
          const unsigned from[4] = {at.x, at.y, at.z, at.w};
          add_scores<T, HD, 4>(s, from, stage, 0, step);
        } else {
          add_scores<T, HD, 4>(s, a[QUERIES_IN_SHARED ? 0 : step], stage, 0, step);
        }
      }
      const bool whole = key >= own.all.first && key + TILE <= own.all.end;
      mask_scores(s, top, scale, key, whole, rows);
      running.raise(top);
      float all[2], quarter[2];
      weigh<T>(p[0], all, s[0], s[1], running);
#pragma unroll
      for (unsigned w = 1; w < 4; w++) {
        weigh<T>(p[w], quarter, s[2 * w], s[2 * w + 1], running);
        all[0] = __fadd_rn(all[0], quarter[0]);
        all[1] = __fadd_rn(all[1], quarter[1]);
      }
      sum[0] = __fmaf_rn(sum[0], running.decay[0], all[0]);
      sum[1] = __fmaf_rn(sum[1], running.decay[1], all[1]);
#pragma unroll
      for (unsigned n = 0; n < HD / 8; n++)
#pragma unroll
        for (unsigned i = 0; i < 4; i++) o[n][i] = __fmul_rn(o[n][i], running.decay[i / 2]);
    }
    stage = next_stage(2 * tile + 1);
    if (seen) {
#pragma unroll
      for (unsigned w = 0; w < 4; w++) add_values<T, HD, HD / 16>(o, p[w], stage, w, 0, 1);
    }
    if ((tile + 1) % TILES_OF_SPLIT != 0 && tile + 1 != end_tile) continue;

#pragma unroll
    for (unsigned i = 0; i < 2; i++) merge[i].add(running.top[i], quad_sum(sum[i]));
    if (merging) {
#pragma unroll
      for (unsigned n = 0; n < HD / 8; n++)
#pragma unroll
        for (unsigned i = 0; i < 4; i++) o[n][i] = merge[i / 2].value(merged[(n * 4 + i) * THREADS], o[n][i]);
    }
    if (tile + 1 != end_tile) {
#pragma unroll
      for (unsigned n = 0; n < HD / 8; n++)
#pragma unroll
        for (unsigned i = 0; i < 4; i++) merged[(n * 4 + i) * THREADS] = o[n][i];
      merging = true;
      reset();
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (unsigned i = 0; i < 2; i++) {
    const unsigned pair = item.first_pair + warp * LANE_PAIRS + g + i * 8;
    if (pair >= own.to) continue;
    const PairPlace place(item, pair, kv_head, kv_heads, group, head_dim, ld);
    const float by = inverse(merge[i].sum);
#pragma unroll
    for (unsigned n = 0; n < HD / 8; n++) {
      const unsigned col = n * 8 + lane % 4 * 2;
      if (col >= head_dim) continue;
      *reinterpret_cast<unsigned*>(out + place.at + col) = pack2<T>(attended(o[n][2 * i], by), attended(o[n][2 * i + 1], by));
    }
    if (place.last) pad_row(out + place.at, kv_heads * group * head_dim, head_dim, ld, lane % 4, 4);
  }
}

#define KERNEL(T, suffix, HD, WARPS, BUFFERS)                                                                          \
  extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) attention_prefill_##suffix##_##HD(                       \
      T* __restrict__ out, const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,                  \
      const unsigned* __restrict__ words, const unsigned* __restrict__ items, unsigned kv_heads, unsigned group,       \
      unsigned head_dim, unsigned ld, unsigned block_size, unsigned magic, unsigned shift, float scale,                \
      unsigned window) {                                                                                               \
    attend_rows<T, HD, WARPS, BUFFERS>(out, q, k, v, words, items, kv_heads, group, head_dim, ld, block_size, magic,   \
                                       shift, scale, window);                                                          \
  }                                                                                                                    \
  EXPORT_KERNEL(attention_prefill_##suffix##_##HD)
#define FOR_TYPE(T, suffix)       \
  KERNEL(T, suffix, 32, 8, 4)     \
  KERNEL(T, suffix, 64, 8, 4)     \
  KERNEL(T, suffix, 128, 8, 4)    \
  KERNEL(T, suffix, 256, 4, 2)
FOR_TYPE(bf16, bf16)
FOR_TYPE(f16, f16)
#undef FOR_TYPE
#undef KERNEL
