// The chosen experts of each token: pairs (token, k) are sorted by expert and cut into tiles of one expert each, which
// go through gate, up and down; then each token's pairs are summed.
#include "gemm.cuh"

// What a block works on: `count` pairs of an expert, before which `first` pairs are sorted. A tile without pairs is
// none.
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

// sorted u32 [max_tiles, tile]: each tile's pairs, with a gap where they are fewer: so a block finds them without
// having read its tile. tiles [max_tiles]: by ascending expert, pairs ascending within one; those without pairs come
// last. Pairs whose id is not below `num_experts` are left out. One block, of at least `num_experts` threads; shared
// memory for warps * num_experts numbers.
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
    for (unsigned i = 0; i < warps; i++) counts[i * num_experts + expert] += first_tile * tile;
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
  __device__ __forceinline__ void prepare() const {}
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

// parts[pair] = weight * sums, f32 [pairs, hidden] in the order of (token, k).
struct WeightedPart {
  static constexpr unsigned PANELS = 1;
  float* parts;
  const float* topk_weights;
  unsigned hidden, count;
  unsigned pair;  // of this thread in the tile, if there are so many
  unsigned* pairs;  // of the tile, in shared memory
  float* weights;
  __device__ __forceinline__ void prepare() const {
    if (threadIdx.x < count) {
      pairs[threadIdx.x] = pair;
      weights[threadIdx.x] = topk_weights[pair];
    }
  }
  __device__ __forceinline__ void put(unsigned panel, unsigned tile, const float (&sums)[1][4]) const {
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (unsigned c = 0; c < 2; c++) {
      const unsigned i = tile * 8 + lane % 4 * 2 + c;
      if (i >= count) continue;
      float* part = parts + size_t(pairs[i]) * hidden;
#pragma unroll
      for (unsigned h = 0; h < 2; h++) {
        const unsigned feature = panel * 16 + lane / 4 + h * 8;
        if (feature < hidden) part[feature] = sums[0][2 * h + c] * weights[i];
      }
    }
  }
};

// The operand's row of each pair. A thread's pairs are read before it is known whether they are there.
template <unsigned SLOTS>
struct TokenOfPair {
  unsigned pair[SLOTS], count, top_k;
  // The thread's slots are `step` apart from `pairs` on.
  __device__ __forceinline__ TokenOfPair(const unsigned* pairs, unsigned step, unsigned top_k) : count(0), top_k(top_k) {
#pragma unroll
    for (unsigned i = 0; i < SLOTS; i++) pair[i] = load_now(pairs + i * step);
  }
  __device__ __forceinline__ unsigned operator()(unsigned slot, unsigned i) const {
    return i < count ? pair[slot] / top_k : NO_ROW;
  }
};

__device__ __forceinline__ ExpertTile tile_of(const ExpertTile* tiles) {
  const uint4 v = load_stream(tiles + blockIdx.y);
  return {v.x, v.y, v.z, v.w};
}

__device__ __forceinline__ Weights weights_of(const void* experts, unsigned expert, unsigned panels, unsigned row_bytes,
                                              unsigned segment) {
  const unsigned chunks = row_bytes / ROW_BYTES;
  return {static_cast<const unsigned char*>(experts) + size_t(expert) * panels * chunks * PANEL_BYTES, panels, chunks,
          segment};
}

// Blocks: the panels of an expert along x, tiles of PAIRS pairs along y. A thread asks for SLOTS tokens, the first of
// them FIRST, the others STEP apart.
#define UP(name, min_blocks, T, PAIRS, SLOTS, FIRST, STEP, product)                                                    \
  extern "C" __global__ void __launch_bounds__(256, min_blocks)                                                        \
      name(T* __restrict__ mid, const T* __restrict__ x, const T* __restrict__ gate_up,                                \
           const ExpertTile* __restrict__ tiles, const unsigned* __restrict__ sorted, unsigned top_k, unsigned ld,     \
           unsigned inter, unsigned mid_ld, unsigned segment) {                                                        \
    DYN_SMEM(unsigned char, smem);                                                                                     \
    TokenOfPair<SLOTS> rows(sorted + size_t(blockIdx.y) * (PAIRS) + (FIRST), STEP, top_k);                             \
    const ExpertTile tile = tile_of(tiles);                                                                            \
    if (tile.count == 0) return;                                                                                       \
    rows.count = tile.count;                                                                                           \
    const unsigned row_bytes = ld * sizeof(T);                                                                         \
    const Weights w = weights_of(gate_up, tile.expert, ceil_div(inter, 16) * 2, row_bytes, segment);                   \
    const Tokens tokens{reinterpret_cast<const unsigned char*>(x), row_bytes};                                         \
    const GatedMid<T> out{mid, mid_ld, tile.first, tile.count};                                                        \
    product;                                                                                                           \
  }                                                                                                                    \
  EXPORT_KERNEL(name)

#define DOWN(name, min_blocks, T, PAIRS, product)                                                                      \
  extern "C" __global__ void __launch_bounds__(256, min_blocks)                                                        \
      name(float* __restrict__ parts, const T* __restrict__ mid, const T* __restrict__ down,                           \
           const ExpertTile* __restrict__ tiles, const unsigned* __restrict__ sorted,                                  \
           const float* __restrict__ topk_weights, unsigned hidden, unsigned mid_ld, unsigned segment) {               \
    DYN_SMEM(unsigned char, smem);                                                                                     \
    __shared__ unsigned pairs[PAIRS];                                                                                  \
    __shared__ float weights[PAIRS];                                                                                   \
    const unsigned pair = load_now(sorted + size_t(blockIdx.y) * (PAIRS) + threadIdx.x % (PAIRS));                     \
    const ExpertTile tile = tile_of(tiles);                                                                            \
    if (tile.count == 0) return;                                                                                       \
    const unsigned row_bytes = mid_ld * sizeof(T);                                                                     \
    const Weights w = weights_of(down, tile.expert, ceil_div(hidden, 16), row_bytes, segment);                         \
    const Tokens tokens{reinterpret_cast<const unsigned char*>(mid), row_bytes};                                       \
    const RowRange rows{tile.first, tile.first + tile.count};                                                          \
    const WeightedPart out{parts, topk_weights, hidden, tile.count, pair, pairs, weights};                             \
    product;                                                                                                           \
  }                                                                                                                    \
  EXPORT_KERNEL(name)

// Warps share K: each reads the whole tile of tokens.
#define SPLIT(T, NT, min_blocks, up, down)                                                                             \
  UP(up, min_blocks, T, NT * 8, NT, threadIdx.x % 32 / 4, 8,                                                           \
     (split_product<T, 2, NT>(smem, w, tokens, rows, out)))                                                            \
  DOWN(down, min_blocks, T, NT * 8, (split_product<T, 2, NT>(smem, w, tokens, rows, out)))

// Warps share 8 panels and the tile of tokens.
#define TILE(T, WM, WN, P, NT, min_blocks, up, down)                                                                   \
  UP(up, min_blocks, T, WN * NT * 8, WN * NT / 8, threadIdx.x / 4, 64,                                                 \
     (tile_product<T, WM, WN, P, NT>(smem, w, tokens, blockIdx.x * 8, rows, out)))                                     \
  DOWN(down, min_blocks, T, WN * NT * 8, (tile_product<T, WM, WN, P, NT>(smem, w, tokens, blockIdx.x * 8, rows, out)))

#define FOR_TYPE(T, suffix)                                                                  \
  SPLIT(T, 1, 2, experts_up_split_8_##suffix, experts_down_split_8_##suffix)                 \
  SPLIT(T, 2, 2, experts_up_split_16_##suffix, experts_down_split_16_##suffix)               \
  SPLIT(T, 4, 2, experts_up_split_32_##suffix, experts_down_split_32_##suffix)               \
  TILE(T, 4, 2, 2, 4, 2, experts_up_tile_64_##suffix, experts_down_tile_64_##suffix)         \
  TILE(T, 2, 4, 4, 4, 1, experts_up_tile_128_##suffix, experts_down_tile_128_##suffix)
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
