// The router: logits of all experts, then the choice of each row, its weights, and its place in the ring.
//
// K is cut into chunks by the layer's shape alone. A logit is the sum of its chunks in ascending order, whoever adds them:
// one block that walks them all, or, for few rows, a block a chunk (grid.z of them) and then `router_select`.
#include "common.cuh"

constexpr unsigned STAGE = 64;         // columns that are loaded at once
constexpr unsigned STAGE16 = STAGE / 16;
constexpr unsigned MMA_TOKENS = 64;    // rows of x of a block
constexpr unsigned MMA_STAGES = 3;     // tiles of x in flight
constexpr unsigned MMA_LD = STAGE + 8; // elements between rows of a tile, so that ldmatrix meets no bank twice

// The lane's part of four column blocks of a panel; zeros beyond the matrix.
template <class T, unsigned WORDS = sizeof(T) / 2>
__device__ __forceinline__ void load_panel(uint4 (&a)[STAGE16][WORDS], const T* weight, unsigned panel, unsigned panels,
                                           unsigned stage, unsigned cols16) {
#pragma unroll
  for (unsigned j = 0; j < STAGE16; j++) {
    const unsigned col16 = stage * STAGE16 + j;
    const T* from = weight + (size_t(panel) * cols16 + col16) * 256 + threadIdx.x % 32 * 8;
#pragma unroll
    for (unsigned word = 0; word < WORDS; word++)
      a[j][word] = panel < panels && col16 < cols16 ? load_stream(reinterpret_cast<const uint4*>(from) + word)
                                                    : make_uint4(0, 0, 0, 0);
  }
}

// The stages of a block: of chunk blockIdx.z, or all.
struct Stages {
  unsigned first, end, chunk;
  __device__ Stages(unsigned cols16, unsigned chunk_stages) : chunk(chunk_stages) {
    const unsigned all = ceil_div(cols16, STAGE16);
    first = gridDim.z == 1 ? 0 : blockIdx.z * chunk;
    end = gridDim.z == 1 ? all : umin(first + chunk, all);
  }
  __device__ bool ends_chunk(unsigned stage) const { return stage + 1 == end || (stage + 1) % chunk == 0; }
};

// out[z, row, expert] f32 [grid.z, n, experts]: 16 experts a warp, 64 rows a block, on tensor cores.
template <class T>
__device__ void logits_mma(float* out, const T* weight, const T* x, unsigned n, unsigned experts, unsigned cols16,
                           unsigned ld, unsigned chunk_stages) {
  __align__(16) __shared__ T tiles[MMA_STAGES][MMA_TOKENS * MMA_LD];
  const unsigned lane = threadIdx.x % 32, panel = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const unsigned panels = ceil_div(experts, 16), first_row = blockIdx.y * MMA_TOKENS;
  const unsigned rows = umin(n - first_row, MMA_TOKENS);
  const Stages stages(cols16, chunk_stages);

  auto load_x = [&](unsigned stage) {
    T* tile = tiles[(stage - stages.first) % MMA_STAGES];
    // Rows beyond the last pair of tiles that is multiplied are not even cleared.
    for (unsigned piece = threadIdx.x; piece < ceil_div(rows, 16) * 16 * (STAGE / 8); piece += blockDim.x) {
      const unsigned row = piece / (STAGE / 8), in_stage = piece % (STAGE / 8) * 8, col = stage * STAGE + in_stage;
      const bool valid = row < rows && col < ld;
      cp_async16(tile + row * MMA_LD + in_stage, valid ? x + size_t(first_row + row) * ld + col : x, valid);
    }
  };

  uint4 a[STAGE16][1], next[STAGE16][1];
  load_panel(next, weight, panel, panels, stages.first, cols16);
#pragma unroll
  for (unsigned i = 0; i + 1 < MMA_STAGES; i++) {
    if (stages.first + i < stages.end) load_x(stages.first + i);
    cp_async_commit();
  }
  float sum[MMA_TOKENS / 8][4] = {}, total[MMA_TOKENS / 8][4] = {};
  for (unsigned stage = stages.first; stage < stages.end; stage++) {
#pragma unroll
    for (unsigned j = 0; j < STAGE16; j++) a[j][0] = next[j][0];
    if (stage + 1 < stages.end) load_panel(next, weight, panel, panels, stage + 1, cols16);
    cp_async_wait<MMA_STAGES - 2>();
    __syncthreads();
    // All have read the tile that is overwritten now.
    if (stage + MMA_STAGES - 1 < stages.end) load_x(stage + MMA_STAGES - 1);
    cp_async_commit();
    const T* tile = tiles[(stage - stages.first) % MMA_STAGES];
#pragma unroll
    for (unsigned j = 0; j < STAGE16; j++) {
      const unsigned part[4] = {a[j][0].x, a[j][0].y, a[j][0].z, a[j][0].w};
#pragma unroll
      for (unsigned pair = 0; pair < MMA_TOKENS / 16; pair++) {
        if (pair * 16 >= rows) break;
        unsigned b[4];
        ldmatrix_x4(b, tile + (pair * 16 + lane / 16 * 8 + lane % 8) * MMA_LD + j * 16 + lane / 8 % 2 * 8);
        const unsigned even[2] = {b[0], b[1]}, odd[2] = {b[2], b[3]};
        mma<T>(sum[2 * pair], part, even);
        mma<T>(sum[2 * pair + 1], part, odd);
      }
    }
    if (stages.ends_chunk(stage)) {
#pragma unroll
      for (unsigned tile8 = 0; tile8 < MMA_TOKENS / 8; tile8++)
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
          total[tile8][i] += sum[tile8][i];
          sum[tile8][i] = 0.f;
        }
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (unsigned tile8 = 0; tile8 < MMA_TOKENS / 8; tile8++)
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
      const unsigned row = tile8 * 8 + lane % 4 * 2 + i % 2, expert = panel * 16 + lane / 4 + i / 2 * 8;
      if (row < rows && expert < experts)
        out[(size_t(blockIdx.z) * n + first_row + row) * experts + expert] = total[tile8][i];
    }
}

constexpr unsigned FMA_TOKENS = 16;

// Element `i` of the 8 of a lane.
__device__ __forceinline__ float element(const uint4 (&a)[2], unsigned i) {
  const uint4& word = a[i / 4];
  return __uint_as_float(i % 4 == 0 ? word.x : i % 4 == 1 ? word.y : i % 4 == 2 ? word.z : word.w);
}
__device__ __forceinline__ unsigned short half_word(const uint4& a, unsigned i) {
  const unsigned word = i / 2 == 0 ? a.x : i / 2 == 1 ? a.y : i / 2 == 2 ? a.z : a.w;
  return (unsigned short)(word >> i % 2 * 16);
}
template <class T>
__device__ __forceinline__ float value_at(const uint4 (&a)[STAGE16][1], unsigned j, unsigned i);
template <>
__device__ __forceinline__ float value_at<bf16>(const uint4 (&a)[STAGE16][1], unsigned j, unsigned i) {
  return to_float(__ushort_as_bfloat16(half_word(a[j][0], i)));
}
template <>
__device__ __forceinline__ float value_at<f16>(const uint4 (&a)[STAGE16][1], unsigned j, unsigned i) {
  return to_float(__ushort_as_half(half_word(a[j][0], i)));
}
template <class T>
__device__ __forceinline__ float value_at(const uint4 (&a)[STAGE16][2], unsigned j, unsigned i) {
  return element(a[j], i);
}

// The same for types that tensor cores do not multiply: 16 experts a warp, 16 rows a block.
template <class W, class X>
__device__ void logits_fma(float* out, const W* weight, const X* x, unsigned n, unsigned experts, unsigned cols16,
                           unsigned width, unsigned ld, unsigned chunk_stages) {
  __align__(16) __shared__ float tile[FMA_TOKENS][STAGE];
  const unsigned lane = threadIdx.x % 32, panel = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const unsigned panels = ceil_div(experts, 16), first_row = blockIdx.y * FMA_TOKENS;
  const unsigned rows = umin(n - first_row, FMA_TOKENS);
  const Stages stages(cols16, chunk_stages);
  // Of row t: the lane's four columns of expert lane / 4, and of expert lane / 4 + 8.
  float sum[FMA_TOKENS][2] = {}, total[FMA_TOKENS][2] = {};
  for (unsigned stage = stages.first; stage < stages.end; stage++) {
    uint4 a[STAGE16][sizeof(W) / 2];
    load_panel(a, weight, panel, panels, stage, cols16);
    __syncthreads();
    for (unsigned at = threadIdx.x; at < FMA_TOKENS * STAGE; at += blockDim.x) {
      const unsigned row = at / STAGE, col = stage * STAGE + at % STAGE;
      tile[row][at % STAGE] = row < rows && col < width ? to_float(x[size_t(first_row + row) * ld + col]) : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (unsigned j = 0; j < STAGE16; j++) {
      float w[8];
#pragma unroll
      for (unsigned i = 0; i < 8; i++) w[i] = value_at<W>(a, j, i);
#pragma unroll
      for (unsigned t = 0; t < FMA_TOKENS; t++) {
        if (t >= rows) break;
        const float2 low = *reinterpret_cast<const float2*>(&tile[t][j * 16 + lane % 4 * 2]);
        const float2 high = *reinterpret_cast<const float2*>(&tile[t][j * 16 + lane % 4 * 2 + 8]);
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
          float acc = fmaf(w[half * 2], low.x, sum[t][half]);
          acc = fmaf(w[half * 2 + 1], low.y, acc);
          acc = fmaf(w[half * 2 + 4], high.x, acc);
          sum[t][half] = fmaf(w[half * 2 + 5], high.y, acc);
        }
      }
    }
    if (stages.ends_chunk(stage)) {
#pragma unroll
      for (unsigned t = 0; t < FMA_TOKENS; t++)
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
          float all = sum[t][half] + __shfl_xor_sync(FULL_WARP, sum[t][half], 1);
          all += __shfl_xor_sync(FULL_WARP, all, 2);
          total[t][half] += all;
          sum[t][half] = 0.f;
        }
    }
  }
#pragma unroll
  for (unsigned t = 0; t < FMA_TOKENS; t++)
#pragma unroll
    for (unsigned half = 0; half < 2; half++) {
      const unsigned expert = panel * 16 + lane / 4 + half * 8;
      if (t % 4 == lane % 4 && t < rows && expert < experts)
        out[(size_t(blockIdx.z) * n + first_row + t) * experts + expert] = total[t][half];
    }
}

#define FOR_TYPE(T, suffix)                                                                                            \
  extern "C" __global__ void __launch_bounds__(128)                                                                    \
      router_logits_##suffix##_##suffix(float* __restrict__ out, const T* __restrict__ weight,                         \
                                        const T* __restrict__ x, unsigned n, unsigned experts, unsigned cols16,        \
                                        unsigned width, unsigned ld, unsigned chunk_stages) {                          \
    logits_mma<T>(out, weight, x, n, experts, cols16, ld, chunk_stages);                                               \
  }                                                                                                                    \
  EXPORT_KERNEL(router_logits_##suffix##_##suffix)
FOR_TYPE(bf16, bf16)
FOR_TYPE(f16, f16)
#undef FOR_TYPE

#define FOR_TYPES(W, w, X, x_)                                                                                         \
  extern "C" __global__ void __launch_bounds__(128)                                                                    \
      router_logits_##w##_##x_(float* __restrict__ out, const W* __restrict__ weight, const X* __restrict__ x,         \
                               unsigned n, unsigned experts, unsigned cols16, unsigned width, unsigned ld,             \
                               unsigned chunk_stages) {                                                                \
    logits_fma<W, X>(out, weight, x, n, experts, cols16, width, ld, chunk_stages);                                     \
  }                                                                                                                    \
  EXPORT_KERNEL(router_logits_##w##_##x_)
FOR_TYPES(float, f32, float, f32)
FOR_TYPES(float, f32, bf16, bf16)
FOR_TYPES(float, f32, f16, f16)
FOR_TYPES(bf16, bf16, float, f32)
FOR_TYPES(bf16, bf16, f16, f16)
FOR_TYPES(f16, f16, float, f32)
FOR_TYPES(f16, f16, bf16, bf16)
#undef FOR_TYPES

constexpr unsigned SELECT_ROWS = 4;  // of a block; a warp each
constexpr unsigned SIGMOID = 1, NORMALISE = 2;

// Larger score first when compared as an integer; NaN comes last, and only `OUT` behind it.
constexpr unsigned OUT = 0, NAN_RANK = 1;
__device__ __forceinline__ unsigned rank_of(float score) {
  // Adding zero turns -0.0 into 0.0: they are equal, so the lower id must win.
  const unsigned bits = __float_as_uint(score + 0.f);
  if (score != score) return NAN_RANK;
  return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ float score_of(unsigned rank) {
  return __uint_as_float(rank <= NAN_RANK ? 0x7fffffffu : rank >> 31 ? rank & 0x7fffffffu : ~rank);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// Clears the ranks of experts outside the `topk_group` best groups; a group is as good as its two best experts together.
template <unsigned PER>
__device__ void keep_groups(unsigned (&rank)[PER], unsigned experts, unsigned n_group, unsigned topk_group) {
  const unsigned lane = threadIdx.x % 32, size = experts / n_group;
  unsigned mine = OUT;  // of group `lane`
  for (unsigned group = 0; group < n_group; group++) {
    unsigned first = OUT, second = OUT;
#pragma unroll
    for (unsigned i = 0; i < PER; i++) {
      const unsigned here = (lane + 32 * i) / size == group ? rank[i] : OUT;
      second = umax(second, umin(first, here));
      first = umax(first, here);
    }
    const unsigned best = __reduce_max_sync(FULL_WARP, first);
    if (lane + 1 == unsigned(__ffs(__ballot_sync(FULL_WARP, first == best)))) first = second;
    const unsigned next = __reduce_max_sync(FULL_WARP, first);
    const unsigned both = rank_of(size == 1 ? score_of(best) : score_of(best) + score_of(next));
    if (lane == group) mine = both;
  }
  unsigned kept = 0;
  for (unsigned i = 0; i < topk_group; i++) {
    const unsigned best = __reduce_max_sync(FULL_WARP, mine);
    const unsigned at = __ffs(__ballot_sync(FULL_WARP, mine == best)) - 1;
    kept |= 1u << at;
    if (lane == at) mine = OUT;
  }
#pragma unroll
  for (unsigned i = 0; i < PER; i++) {
    const unsigned id = lane + 32 * i;
    if (id < experts && !(kept >> id / size & 1)) rank[i] = OUT;
  }
}

// The choice of a row: the `top_k` best ids, or those that a replay gives; their weights from the row's logits; the ids to
// the ring. A warp a row; the lane holds experts lane, lane + 32, ...; lane k holds the k-th choice.
//
// A row whose slot is none pads the batch: it chooses no expert, so that no weights are read for it, and marks nothing.
// Where there are no `slots`, no row does.
//
// `parts` f32 [num_parts, n, experts] are added up, to `logits` too if there are several. Slots that the ring does not
// have are not written. `marks` u32 [2, n]: whether a logit was NaN; how often a replay gave a set
// that is not the row's own.
template <unsigned PER>
__device__ void select(const float* parts, float* logits, unsigned num_parts, unsigned n, unsigned experts,
                       unsigned top_k, unsigned flags, const float* bias, unsigned n_group, unsigned topk_group,
                       float scaling, unsigned* topk_ids, float* topk_weights, void* ring, unsigned wide,
                       unsigned num_slots, unsigned moe_layers, unsigned moe_layer, const unsigned* slots,
                       const unsigned* row_of, const unsigned short* given_ids, unsigned given_layers,
                       unsigned given_layer, unsigned* marks) {
  __shared__ float held[SELECT_ROWS][PER * 32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x * SELECT_ROWS + warp;
  if (row >= n) return;
  const unsigned slot = slots == nullptr ? 0 : slots[row];
  if (slot == NO_ROW) {
    if (lane < top_k) {
      topk_ids[size_t(row) * top_k + lane] = NO_ROW;
      topk_weights[size_t(row) * top_k + lane] = 0.f;
    }
    return;
  }
  float logit[PER] = {};
  for (unsigned part = 0; part < num_parts; part++)
#pragma unroll
    for (unsigned i = 0; i < PER; i++)
      if (lane + 32 * i < experts) logit[i] += parts[(size_t(part) * n + row) * experts + lane + 32 * i];

  bool is_nan = false;
  float max = -INFINITY;
  unsigned rank[PER];
#pragma unroll
  for (unsigned i = 0; i < PER; i++) {
    const unsigned id = lane + 32 * i;
    rank[i] = OUT;
    if (id >= experts) continue;
    held[warp][id] = logit[i];
    if (num_parts > 1) logits[size_t(row) * experts + id] = logit[i];
    is_nan |= logit[i] != logit[i];
    max = fmaxf(max, logit[i]);
    const float score = flags & SIGMOID ? sigmoid(logit[i]) + (bias == nullptr ? 0.f : bias[id]) : logit[i];
    rank[i] = rank_of(score);
  }
  __syncwarp();
  is_nan = __any_sync(FULL_WARP, is_nan);
  max = warp_max(max);
  if (n_group > 1) keep_groups<PER>(rank, experts, n_group, topk_group);

  unsigned chosen = 0;
  for (unsigned k = 0; k < top_k; k++) {
    unsigned best = OUT, id = NO_ROW;
#pragma unroll
    for (unsigned i = 0; i < PER; i++) best = umax(best, rank[i]);
    best = __reduce_max_sync(FULL_WARP, best);
#pragma unroll
    for (unsigned i = 0; i < PER; i++) id = umin(id, rank[i] == best ? lane + 32 * i : NO_ROW);
    id = __reduce_min_sync(FULL_WARP, id);
#pragma unroll
    for (unsigned i = 0; i < PER; i++)
      if (lane + 32 * i == id) rank[i] = OUT;
    if (lane == k) chosen = id;
  }

  bool changed = false;
  const unsigned given_row = row_of == nullptr ? NO_ROW : row_of[row];
  if (given_row != NO_ROW) {
    const unsigned short* cell = given_ids + (size_t(given_row) * given_layers + given_layer) * top_k;
    const unsigned given = lane < top_k ? cell[lane] : NO_ROW;
    // Both are distinct and of one length, so a subset is the set.
    for (unsigned k = 0; k < top_k; k++) {
      const unsigned id = __shfl_sync(FULL_WARP, given, k);
      changed |= !__any_sync(FULL_WARP, lane < top_k && chosen == id);
    }
    chosen = lane < top_k ? given : 0;
  }

  float weight = 0.f, total = 0.f;
  if (lane < top_k) weight = flags & SIGMOID ? sigmoid(held[warp][chosen]) : expf(held[warp][chosen] - max);
  if (flags & NORMALISE) {
    for (unsigned k = 0; k < top_k; k++) total += __shfl_sync(FULL_WARP, weight, k);
    if (flags & SIGMOID) total += 1e-20f;
    weight /= total;
  } else if (!(flags & SIGMOID)) {
#pragma unroll
    for (unsigned i = 0; i < PER; i++) total += lane + 32 * i < experts ? expf(held[warp][lane + 32 * i] - max) : 0.f;
    weight /= warp_sum(total);
  }
  weight *= scaling;

  if (lane < top_k) {
    topk_ids[size_t(row) * top_k + lane] = chosen;
    topk_weights[size_t(row) * top_k + lane] = weight;
    if (slot < num_slots) {
      const size_t cell = (size_t(slot) * moe_layers + moe_layer) * top_k + lane;
      if (wide) static_cast<unsigned short*>(ring)[cell] = (unsigned short)chosen;
      else static_cast<unsigned char*>(ring)[cell] = (unsigned char)chosen;
    }
  }
  if (lane == 0 && is_nan) marks[row] = 1;
  if (lane == 0 && changed) marks[n + row] += 1;
}

#define FOR_SIZE(experts_, per)                                                                                        \
  extern "C" __global__ void __launch_bounds__(SELECT_ROWS * 32, 4) router_select_##experts_(                             \
      const float* parts, float* logits, unsigned num_parts, unsigned n, unsigned experts, unsigned top_k,             \
      unsigned flags, const float* __restrict__ bias, unsigned n_group, unsigned topk_group, float scaling,            \
      unsigned* __restrict__ topk_ids, float* __restrict__ topk_weights, void* __restrict__ ring, unsigned wide,       \
      unsigned num_slots, unsigned moe_layers, unsigned moe_layer, const unsigned* __restrict__ slots,                 \
      const unsigned* __restrict__ row_of, const unsigned short* __restrict__ given_ids, unsigned given_layers,        \
      unsigned given_layer, unsigned* __restrict__ marks) {                                                            \
    select<per>(parts, logits, num_parts, n, experts, top_k, flags, bias, n_group, topk_group, scaling, topk_ids,      \
                topk_weights, ring, wide, num_slots, moe_layers, moe_layer, slots, row_of, given_ids, given_layers,    \
                given_layer, marks);                                                                                   \
  }                                                                                                                    \
  EXPORT_KERNEL(router_select_##experts_)
FOR_SIZE(128, 4)
FOR_SIZE(256, 8)
FOR_SIZE(512, 16)
FOR_SIZE(1024, 32)
#undef FOR_SIZE
