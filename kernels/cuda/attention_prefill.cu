// Paged attention over whole contexts: a block takes 16 * M * WARPS (row, head) pairs of a sequence that share keys.
#include "attention.cuh"

// Each warp takes M times 16 pairs, so that what it loads of keys and values serves M products. Shared memory: BUFFERS
// tiles, which take keys and values in turn; then, where the registers have no room, the queries, each thread's own.
// `merged` f32 [items, kv_heads, M * HD / 8, threads, 4] takes the values of earlier splits where a context has several;
// each thread reads what it wrote itself.
template <class T, unsigned HD, unsigned M, unsigned WARPS, unsigned BUFFERS, bool QUERIES_IN_SHARED>
__device__ __forceinline__ void attend_rows(T* out, float* merged, const T* q, const T* k, const T* v, const unsigned* words,
                                            const unsigned* items, unsigned kv_heads, unsigned group, unsigned head_dim,
                                            unsigned ld, unsigned block_size, unsigned magic, unsigned shift, float scale,
                                            unsigned window) {
  constexpr unsigned THREADS = WARPS * 32, STEPS = HD / 16, PAIRS = M * LANE_PAIRS;
  DYN_SMEM(unsigned char, shared);
  T* const tiles = reinterpret_cast<T*>(shared);
  uint4* const queries = reinterpret_cast<uint4*>(shared + BUFFERS * TILE * HD * sizeof(T)) + threadIdx.x;
  float4* const earlier = reinterpret_cast<float4*>(merged) +
                          (size_t(blockIdx.y) * kv_heads + blockIdx.x) * (M * HD / 8 * THREADS) + threadIdx.x;

  const unsigned kv_head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Item item = item_at(items, blockIdx.y);
  const Visible block = PairRange(item, item.first_pair, WARPS * PAIRS, group, window).any;
  const PairRange own(item, item.first_pair + warp * PAIRS, PAIRS, group, window);
  const Paging paging{words + item.table, kv_heads, kv_head, head_dim, block_size, magic, shift};
  // This lane's rows of product m are pairs first + 16 m and first + 16 m + 8.
  const unsigned first = item.first_pair + warp * PAIRS + lane / 4;

  unsigned a[QUERIES_IN_SHARED ? 1 : M * STEPS][4];
  unsigned ends[M][2];
#pragma unroll
  for (unsigned m = 0; m < M; m++) {
    const T* from[2];
#pragma unroll
    for (unsigned i = 0; i < 2; i++) {
      const unsigned pair = first + m * 16 + i * 8;
      ends[m][i] = pair < own.to ? item.first_position + pair / group + 1 : 0;
      from[i] = pair < own.to ? q + PairPlace(item, pair, kv_head, kv_heads, group, head_dim, ld).at : nullptr;
    }
#pragma unroll
    for (unsigned step = 0; step < STEPS; step++) {
      unsigned(&to)[4] = a[QUERIES_IN_SHARED ? 0 : m * STEPS + step];
      query_fragment(to, from[0], from[1], step * 16, head_dim);
      if (QUERIES_IN_SHARED) queries[(m * STEPS + step) * THREADS] = make_uint4(to[0], to[1], to[2], to[3]);
    }
  }

  const unsigned first_tile = block.first / TILE, end_tile = (block.end + TILE - 1) / TILE;
  // Stages count absolutely: 2 tile for the keys, 2 tile + 1 for the values. Each stage commits one group.
  const auto load = [&](unsigned stage, unsigned buffer) {
    if (stage < 2 * end_tile)
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

  Running running[M];
  Merge merge[M][2];
  float o[M][HD / 8][4], sum[M][2];
  bool merging = false;
  const auto reset = [&] {
#pragma unroll
    for (unsigned m = 0; m < M; m++) {
      running[m].reset();
      sum[m][0] = sum[m][1] = 0.f;
#pragma unroll
      for (unsigned n = 0; n < HD / 8; n++)
#pragma unroll
        for (unsigned i = 0; i < 4; i++) o[m][n][i] = 0.f;
    }
  };
  reset();
#pragma unroll
  for (unsigned m = 0; m < M; m++) {
    merge[m][0].reset();
    merge[m][1].reset();
  }

  for (unsigned tile = first_tile; tile < end_tile; tile++) {
    const unsigned key = tile * TILE;
    // A tile of which none of the warp's pairs sees anything would leave all as it is.
    const bool seen = key < own.any.end && key + TILE > own.any.first;
    const T* stage = next_stage(2 * tile);
    unsigned p[M][4][4];
    if (seen) {
      float s[M][8][4];
#pragma unroll
      for (unsigned i = 0; i < M * 32; i++) s[i / 32][i / 4 % 8][i % 4] = 0.f;
#pragma unroll (QUERIES_IN_SHARED ? 4 : STEPS)
      for (unsigned step = 0; step < STEPS; step++) {
        unsigned from[M][4];
#pragma unroll
        for (unsigned m = 0; m < M; m++) {
          if (QUERIES_IN_SHARED) {
            const uint4 at = queries[(m * STEPS + step) * THREADS];
            from[m][0] = at.x, from[m][1] = at.y, from[m][2] = at.z, from[m][3] = at.w;
          } else {
#pragma unroll
            for (unsigned i = 0; i < 4; i++) from[m][i] = a[QUERIES_IN_SHARED ? 0 : m * STEPS + step][i];
          }
        }
        add_scores<T, HD, M, 4>(s, from, stage, 0, step);
      }
      const bool whole = key >= own.all.first && key + TILE <= own.all.end;
#pragma unroll
      for (unsigned m = 0; m < M; m++) {
        float top[2], all[2], quarter[2];
        mask_scores(s[m], top, scale, key, whole, ends[m], window);
        running[m].raise(top);
        weigh<T>(p[m][0], all, s[m][0], s[m][1], running[m]);
#pragma unroll
        for (unsigned w = 1; w < 4; w++) {
          weigh<T>(p[m][w], quarter, s[m][2 * w], s[m][2 * w + 1], running[m]);
          all[0] = __fadd_rn(all[0], quarter[0]);
          all[1] = __fadd_rn(all[1], quarter[1]);
        }
#pragma unroll
        for (unsigned i = 0; i < 2; i++) sum[m][i] = __fmaf_rn(sum[m][i], running[m].decay[i], all[i]);
#pragma unroll
        for (unsigned n = 0; n < HD / 8; n++)
#pragma unroll
          for (unsigned i = 0; i < 4; i++) o[m][n][i] = __fmul_rn(o[m][n][i], running[m].decay[i / 2]);
      }
    }
    stage = next_stage(2 * tile + 1);
    if (seen) {
#pragma unroll
      for (unsigned w = 0; w < 4; w++) {
        unsigned from[M][4];
#pragma unroll
        for (unsigned i = 0; i < M * 4; i++) from[i / 4][i % 4] = p[i / 4][w][i % 4];
        add_values<T, HD, M, HD / 16>(o, from, stage, w, 0, 1);
      }
    }
    if ((tile + 1) % TILES_OF_SPLIT != 0 && tile + 1 != end_tile) continue;

#pragma unroll
    for (unsigned m = 0; m < M; m++) {
#pragma unroll
      for (unsigned i = 0; i < 2; i++) merge[m][i].add(running[m].top[i], quad_sum(sum[m][i]));
      if (merging) {
#pragma unroll
        for (unsigned n = 0; n < HD / 8; n++) {
          const float4 at = earlier[(m * (HD / 8) + n) * THREADS];
          o[m][n][0] = merge[m][0].value(at.x, o[m][n][0]);
          o[m][n][1] = merge[m][0].value(at.y, o[m][n][1]);
          o[m][n][2] = merge[m][1].value(at.z, o[m][n][2]);
          o[m][n][3] = merge[m][1].value(at.w, o[m][n][3]);
        }
      }
    }
    if (tile + 1 != end_tile) {
#pragma unroll
      for (unsigned m = 0; m < M; m++)
#pragma unroll
        for (unsigned n = 0; n < HD / 8; n++)
          earlier[(m * (HD / 8) + n) * THREADS] = make_float4(o[m][n][0], o[m][n][1], o[m][n][2], o[m][n][3]);
      merging = true;
      reset();
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (unsigned m = 0; m < M; m++)
#pragma unroll
    for (unsigned i = 0; i < 2; i++) {
      const unsigned pair = first + m * 16 + i * 8;
      if (pair >= own.to) continue;
      const PairPlace place(item, pair, kv_head, kv_heads, group, head_dim, ld);
      const float by = inverse(merge[m][i].sum);
#pragma unroll
      for (unsigned n = 0; n < HD / 8; n++) {
        const unsigned col = n * 8 + lane % 4 * 2;
        if (col >= head_dim) continue;
        *reinterpret_cast<unsigned*>(out + place.at + col) =
            pack2<T>(attended(o[m][n][2 * i], by), attended(o[m][n][2 * i + 1], by));
      }
      if (place.last) pad_row(out + place.at, kv_heads * group * head_dim, head_dim, ld, lane % 4, 4);
    }
}

#define KERNEL(T, suffix, HD, M, WARPS, BUFFERS, QUERIES_IN_SHARED)                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) attention_prefill_##suffix##_##HD(                       \
      T* __restrict__ out, float* __restrict__ merged, const T* __restrict__ q, const T* __restrict__ k,               \
      const T* __restrict__ v, const unsigned* __restrict__ words, const unsigned* __restrict__ items,                 \
      unsigned kv_heads, unsigned group, unsigned head_dim, unsigned ld, unsigned block_size, unsigned magic,          \
      unsigned shift, float scale, unsigned window) {                                                                  \
    attend_rows<T, HD, M, WARPS, BUFFERS, QUERIES_IN_SHARED>(out, merged, q, k, v, words, items, kv_heads, group,      \
                                                             head_dim, ld, block_size, magic, shift, scale, window);   \
  }                                                                                                                    \
  EXPORT_KERNEL(attention_prefill_##suffix##_##HD)
// As `prefill_layout` in `attention.rs` says.
#define FOR_TYPE(T, suffix)                \
  KERNEL(T, suffix, 32, 2, 4, 4, false)    \
  KERNEL(T, suffix, 64, 2, 4, 4, false)    \
  KERNEL(T, suffix, 128, 2, 4, 2, true)    \
  KERNEL(T, suffix, 256, 1, 4, 2, true)
FOR_TYPE(bf16, bf16)
FOR_TYPE(f16, f16)
#undef FOR_TYPE
#undef KERNEL
