// What a token's probability is, and which are the most likely, before temperature and cuts.
#include "sample.cuh"

constexpr unsigned CHUNK = 4096;  // tokens of a block
constexpr unsigned MAX_TOP = 20;

// Larger logit first, ties lower id first, NaN last; 0 is none.
__device__ __forceinline__ u64 top_key(float logit, unsigned id) {
  return u64(logit != logit ? 0 : order_key(logit + 0.f)) << 32 | ~id;
}

// Writes the `top` largest keys that the threads hold, best first, from thread 0.
template <unsigned EACH, class F>
__device__ void best_keys(u64 (&key)[EACH], unsigned top, F&& write) {
  __shared__ u64 part[2][THREADS / 32];
  u64 mine = 0;
#pragma unroll
  for (unsigned i = 0; i < EACH; i++) mine = key[i] > mine ? key[i] : mine;
  for (unsigned place = 0; place < top; place++) {
    u64 best = mine;
    for (int step = 16; step > 0; step >>= 1) {
      const u64 other = __shfl_xor_sync(FULL_WARP, best, step);
      best = other > best ? other : best;
    }
    if (threadIdx.x % 32 == 0) part[place % 2][threadIdx.x / 32] = best;
    __syncthreads();  // the half that is written next was read before it
    for (unsigned i = 0; i < THREADS / 32; i++) best = part[place % 2][i] > best ? part[place % 2][i] : best;
    if (threadIdx.x == 0) write(place, best);
    if (best != 0 && mine == best) {
      mine = 0;
#pragma unroll
      for (unsigned i = 0; i < EACH; i++) {
        if (key[i] == best) key[i] = 0;
        mine = key[i] > mine ? key[i] : mine;
      }
    }
  }
  __syncthreads();
}

// The token's logprob and rank, and the most likely tokens. A block takes CHUNK tokens, then the last the best of all.
extern "C" __global__ void __launch_bounds__(THREADS)
    sample_logprobs(const float* __restrict__ logits, const Params* params_, RowState* states, u64* keys_, unsigned* out_,
                    unsigned top, unsigned vocab) {
  const unsigned row = blockIdx.y, num_top = params_[row].logprobs - 1;
  if (params_[row].logprobs == 0) return;
  const float* x = logits + size_t(params_[row].row) * vocab;
  RowState& state = states[row];
  unsigned* out = Out{out_, top}.row(row);
  u64* keys = keys_ + size_t(row) * gridDim.x * MAX_TOP;
  const unsigned token = out[TOKEN];
  const float own = token < vocab ? x[token] : NAN;
  constexpr unsigned EACH = CHUNK / THREADS;
  u64 key[EACH];
  unsigned above = 0;
#pragma unroll
  for (unsigned i = 0; i < EACH; i++) {
    const unsigned id = blockIdx.x * CHUNK + i * THREADS + threadIdx.x;
    const float value = id < vocab ? x[id] : -INFINITY;
    above += value > own;
    key[i] = id < vocab ? top_key(value, id) : 0;
  }
  above = warp_add(above);
  if (threadIdx.x % 32 == 0 && above != 0) atomicAdd(&state.above, above);
  best_keys(key, num_top, [&](unsigned place, u64 best) { keys[blockIdx.x * num_top + place] = best; });
  if (!arrives_last(&state.tickets[3])) return;
  // At most CHUNK keys: 20 of each 4096 tokens.
#pragma unroll
  for (unsigned i = 0; i < EACH; i++) {
    const unsigned at = i * THREADS + threadIdx.x;
    key[i] = at < gridDim.x * num_top ? keys[at] : 0;
  }
  const float log_sum = fabsf(state.max) < INFINITY ? float(log(double(state.raw) * 0x1p-44)) : NAN;
  best_keys(key, num_top, [&](unsigned place, u64 best) {
    const unsigned id = best == 0 ? NO_ROW : ~unsigned(best);
    out[TOP + place] = id;
    out[TOP + top + place] = __float_as_uint(id < vocab ? x[id] - state.max - log_sum : NAN);
  });
  if (threadIdx.x == 0) {
    out[LOGPROB] = __float_as_uint(own - state.max - log_sum);
    out[RANK] = 1 + *(volatile unsigned*)&state.above;
  }
}
EXPORT_KERNEL(sample_logprobs)
