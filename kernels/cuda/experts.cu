// The chosen experts of each token: pairs (token, k) are sorted by expert and cut into tiles of one expert each, which go
// through gate, up and down; then each token's pairs are summed.
#include "gemm.cuh"

// What a block works on: pairs sorted[first .. first + count] of an expert. A tile without pairs is none.
struct alignas(16) ExpertTile {
  unsigned expert, first, count, unused;
};

// Sum over the threads before this one, and over all; `part` has room for 32 numbers of shared memory.
__device__ __forceinline__ unsigned sum_before(unsigned value, unsigned* part, unsigned& all) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  unsigned sum = value;
#pragma unroll
  for (unsigned step = 1; step < 32; step <<= 1) {
    const unsigned other = __shfl_up_sync(FULL_WARP, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) part[warp] = sum;
  __syncthreads();
  unsigned before = 0;
  all = 0;
  for (unsigned i = 0; i < warps; i++) {
    if (i < warp) before += part[i];
    all += part[i];
  }
  __syncthreads();  // `part` may be used again
  return before + sum - value;
}

// sorted u32 [pairs]: pairs by ascending expert, ascending within one. tiles [max_tiles]: every expert's pairs, at most
// `tile` at once; the rest are empty. Pairs whose id is not below `num_experts` are left out. One block, of at least
// `num_experts` threads; shared memory for warps * num_experts numbers.
extern "C" __global__ void __launch_bounds__(1024)
    moe_align(unsigned* __restrict__ sorted, ExpertTile* __restrict__ tiles, const unsigned* __restrict__ topk_ids,
              unsigned pairs, unsigned num_experts, unsigned tile, unsigned max_tiles) {
  DYN_SMEM(unsigned, counts);  // [warps][num_experts]: how many, then where the next goes
  __shared__ unsigned part[32];
  constexpr unsigned AHEAD = 4;  // loads of a lane before use
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (unsigned i = threadIdx.x; i < warps * num_experts; i += blockDim.x) counts[i] = 0;
  __syncthreads();

  // Each warp has a stretch of pairs and counts of its own, so that the order within an expert is that of the pairs.
  const unsigned stretch = ceil_div(pairs, warps * 32) * 32;
  const unsigned begin = umin(warp * stretch, pairs), end = umin(begin + stretch, pairs);
  unsigned* own = counts + warp * num_experts;
  for (unsigned at = begin + lane; at < end; at += 32) {
    const unsigned id = topk_ids[at];
    if (id < num_experts) atomicAdd(&own[id], 1u);
  }
  __syncthreads();

  const unsigned expert = threadIdx.x;
  unsigned total = 0;
  if (expert < num_experts)
    for (unsigned i = 0; i < warps; i++) {
      const unsigned count = counts[i * num_experts + expert];
      counts[i * num_experts + expert] = total;
      total += count;
    }
  unsigned all_pairs, all_tiles;
  const unsigned first = sum_before(total, part, all_pairs);
  const unsigned first_tile = sum_before(ceil_div(total, tile), part, all_tiles);
  if (expert < num_experts) {
    for (unsigned i = 0; i < warps; i++) counts[i * num_experts + expert] += first;
    for (unsigned i = 0; i * tile < total; i++)
      tiles[first_tile + i] = {expert, first + i * tile, umin(tile, total - i * tile), 0};
  }
  for (unsigned i = all_tiles + threadIdx.x; i < max_tiles; i += blockDim.x) tiles[i] = {0, 0, 0, 0};
  __syncthreads();

  for (unsigned at = begin; at < end; at += AHEAD * 32) {
    unsigned ids[AHEAD];
#pragma unroll
    for (unsigned i = 0; i < AHEAD; i++) {
      const unsigned pair = at + i * 32 + lane;
      ids[i] = pair < end ? topk_ids[pair] : NO_ROW;
    }
#pragma unroll
    for (unsigned i = 0; i < AHEAD; i++) {
      const unsigned id = ids[i], same = __match_any_sync(FULL_WARP, id), rank = __popc(same & ((1u << lane) - 1));
      const unsigned next = id < num_experts ? own[id] : 0;
      __syncwarp();  // all lanes have read before one of them moves it on
      if (id < num_experts) {
        sorted[next + rank] = at + i * 32 + lane;
        if (rank == 0) own[id] = next + __popc(same);
      }
      __syncwarp();  // it has moved before the next read
    }
  }
}

// mid[pair] = silu(gate) * up, T [pairs, ld] in sorted order; zeros beyond the width, as the weights there are zero.
template <class T>
struct GatedMid {
  static constexpr unsigned PANELS = 2;
  T* mid;
  unsigned ld, first, count;
  __device__ __forceinline__ void put(unsigned panel, unsigned tile, const float (&sums)[2][4]) const {
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
      const unsigned feature = panel * 16 + lane / 4 + i / 2 * 8, pair = tile * 8 + lane % 4 * 2 + i % 2;
      const float gate = sums[0][i];
      if (feature < ld && pair < count)
        mid[size_t(first + pair) * ld + feature] = from_float<T>(gate / (1.f + __expf(-gate)) * sums[1][i]);
    }
  }
};

// parts[sorted[pair]] = weight * sums, f32 [pairs, hidden] in the order of (token, k).
struct WeightedPart {
  static constexpr unsigned PANELS = 1;
  float* parts;
  const unsigned* pairs;  // of the tile
  const float* topk_weights;
  unsigned hidden, count;
  __device__ __forceinline__ void put(unsigned panel, unsigned tile, const float (&sums)[1][4]) const {
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (unsigned c = 0; c < 2; c++) {
      const unsigned i = tile * 8 + lane % 4 * 2 + c;
      if (i >= count) continue;
      const unsigned pair = pairs[i];
      const float weight = topk_weights[pair];
#pragma unroll
      for (unsigned h = 0; h < 2; h++) {
        const unsigned feature = panel * 16 + lane / 4 + h * 8;
        if (feature < hidden) parts[size_t(pair) * hidden + feature] = sums[0][2 * h + c] * weight;
      }
    }
  }
};

// The operand's row of each pair.
struct TokenOfPair {
  const unsigned* pairs;  // of the tile
  unsigned count, top_k;
  __device__ __forceinline__ unsigned operator()(unsigned i) const { return i < count ? pairs[i] / top_k : NO_ROW; }
};

__device__ __forceinline__ Weights weights_of(const void* experts, unsigned expert, unsigned panels, unsigned row_bytes,
                                              unsigned segment) {
  const unsigned chunks = row_bytes / ROW_BYTES;
  return {static_cast<const unsigned char*>(experts) + size_t(expert) * panels * chunks * PANEL_BYTES, panels, chunks,
          segment};
}

// Blocks: the panels of an expert along x, tiles along y.
#define UP(name, min_blocks, T, product)                                                                               \
  extern "C" __global__ void __launch_bounds__(256, min_blocks)                                                        \
      name(T* __restrict__ mid, const T* __restrict__ x, const T* __restrict__ gate_up,                                \
           const ExpertTile* __restrict__ tiles, const unsigned* __restrict__ sorted, unsigned top_k, unsigned ld,     \
           unsigned inter, unsigned mid_ld, unsigned segment) {                                                        \
    DYN_SMEM(unsigned char, smem);                                                                                     \
    const ExpertTile tile = tiles[blockIdx.y];                                                                         \
    if (tile.count == 0) return;                                                                                       \
    const unsigned row_bytes = ld * sizeof(T);                                                                         \
    const Weights w = weights_of(gate_up, tile.expert, ceil_div(inter, 16) * 2, row_bytes, segment);                   \
    const Tokens tokens{reinterpret_cast<const unsigned char*>(x), row_bytes};                                         \
    const TokenOfPair rows{sorted + tile.first, tile.count, top_k};                                                    \
    const GatedMid<T> out{mid, mid_ld, tile.first, tile.count};                                                        \
    product;                                                                                                           \
  }                                                                                                                    \
  EXPORT_KERNEL(name)

#define DOWN(name, min_blocks, T, product)                                                                             \
  extern "C" __global__ void __launch_bounds__(256, min_blocks)                                                        \
      name(float* __restrict__ parts, const T* __restrict__ mid, const T* __restrict__ down,                           \
           const ExpertTile* __restrict__ tiles, const unsigned* __restrict__ sorted,                                  \
           const float* __restrict__ topk_weights, unsigned hidden, unsigned mid_ld, unsigned segment) {               \
    DYN_SMEM(unsigned char, smem);                                                                                     \
    const ExpertTile tile = tiles[blockIdx.y];                                                                         \
    if (tile.count == 0) return;                                                                                       \
    const unsigned row_bytes = mid_ld * sizeof(T);                                                                     \
    const Weights w = weights_of(down, tile.expert, ceil_div(hidden, 16), row_bytes, segment);                         \
    const Tokens tokens{reinterpret_cast<const unsigned char*>(mid), row_bytes};                                       \
    const RowRange rows{tile.first, tile.first + tile.count};                                                          \
    const WeightedPart out{parts, sorted + tile.first, topk_weights, hidden, tile.count};                              \
    product;                                                                                                           \
  }                                                                                                                    \
  EXPORT_KERNEL(name)

#define SPLIT(T, NT) (split_product<T, 2, NT>(smem, w, tokens, rows, out))
#define TILE(T, WM, WN, P, NT) \
  (tile_product<T, WM, WN, P, NT>(smem, w, tokens, blockIdx.x * (WM * P), rows, out))
#define FOR_TYPE(T, suffix)                                           \
  UP(experts_up_split_8_##suffix, 2, T, SPLIT(T, 1))                  \
  UP(experts_up_split_16_##suffix, 2, T, SPLIT(T, 2))                 \
  UP(experts_up_split_32_##suffix, 2, T, SPLIT(T, 4))                 \
  UP(experts_up_split_64_##suffix, 1, T, SPLIT(T, 8))                 \
  UP(experts_up_tile_64_##suffix, 2, T, TILE(T, 4, 2, 2, 4))          \
  UP(experts_up_tile_128_##suffix, 1, T, TILE(T, 2, 4, 4, 4))         \
  DOWN(experts_down_split_8_##suffix, 2, T, SPLIT(T, 1))              \
  DOWN(experts_down_split_16_##suffix, 2, T, SPLIT(T, 2))             \
  DOWN(experts_down_split_32_##suffix, 2, T, SPLIT(T, 4))             \
  DOWN(experts_down_split_64_##suffix, 1, T, SPLIT(T, 8))             \
  DOWN(experts_down_tile_64_##suffix, 2, T, TILE(T, 4, 2, 2, 4))      \
  DOWN(experts_down_tile_128_##suffix, 1, T, TILE(T, 2, 4, 4, 4))
FOR_TYPE(float, f32)
FOR_TYPE(bf16, bf16)
FOR_TYPE(f16, f16)
#undef FOR_TYPE
#undef TILE
#undef SPLIT
#undef DOWN
#undef UP

// out[token] = the sum of its parts, by ascending expert: f32 [n, hidden]. At most 32 a token. Blocks: tokens along x.
extern "C" __global__ void experts_combine(float* __restrict__ out, const float* __restrict__ parts,
                                           const unsigned* __restrict__ topk_ids, unsigned top_k, unsigned num_experts,
                                           unsigned hidden) {
  __shared__ unsigned order[32], count;
  const unsigned token = blockIdx.x, lane = threadIdx.x;
  if (threadIdx.x < 32) {
    const unsigned id = lane < top_k ? topk_ids[token * top_k + lane] : NO_ROW;
    unsigned rank = 0;
    for (unsigned k = 0; k < top_k; k++) {
      const unsigned other = __shfl_sync(FULL_WARP, id, k);
      rank += other < id || (other == id && k < lane);
    }
    const unsigned chosen = __ballot_sync(FULL_WARP, id < num_experts);
    if (id < num_experts) order[rank] = lane;
    if (lane == 0) count = __popc(chosen);
  }
  __syncthreads();
  const unsigned col = blockIdx.y * blockDim.x + threadIdx.x;
  if (col >= hidden) return;
  float sum = 0.f;
#pragma unroll 8
  for (unsigned k = 0; k < count; k++) sum += parts[(size_t(token) * top_k + order[k]) * hidden + col];
  out[size_t(token) * hidden + col] = sum;
}
EXPORT_KERNEL(moe_align)
EXPORT_KERNEL(experts_combine)
