// What a row's tokens weigh, and where running sums of weights cross a limit.
//
// Weights are exp(logit - max) as whole multiples of 2^-44: their sums are exact whatever the order, so any number of
// blocks gives the same bits. What a sum loses against f64 is below 2^-26 of it for 2^18 tokens, less than the last bit of
// an f32 exp. A logit 32 below the best weighs nothing.
#pragma once
#include "sample.cuh"

constexpr unsigned BUCKETS = 1024;  // 32 a unit of distance from the best logit
constexpr float PER_UNIT = 32.f;

__device__ __forceinline__ u64 fixed(float weight) { return weight > 0.f ? u64(weight * 0x1p44f) : 0; }

// A row as sampling sees it.
struct Scaled {
  const float* logits;
  float temperature, max, floor;
  __device__ Scaled(const float* row, const Params& params, const RowState& state)
      : logits(row), temperature(params.temperature), max(state.max / params.temperature) {
    floor = max + params.ln_min_p;
  }
  // -inf for what cannot be sampled.
  __device__ float at(unsigned id) const {
    const float x = logits[id] / temperature;
    return x >= floor ? x : -INFINITY;
  }
  __device__ u64 weight(float x) const { return fixed(expf(x - max)); }
};
__device__ __forceinline__ unsigned bucket_of(float distance) { return unsigned(distance * PER_UNIT); }

// Where running sums over the threads first have `want` counts, or a mass beyond `limit`.
struct Crossing {
  unsigned thread, count;  // the sums before it
  u64 mass;
  bool found;
};
inline __device__ Crossing find_crossing(unsigned count, u64 mass, unsigned want, u64 limit) {
  __shared__ u64 masses[32];
  __shared__ unsigned counts[32];
  __shared__ Crossing found;
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u64 mass_upto = mass;
  unsigned count_upto = count;
  for (unsigned step = 1; step < 32; step <<= 1) {
    const u64 more_mass = __shfl_up_sync(FULL_WARP, mass_upto, step);
    const unsigned more_count = __shfl_up_sync(FULL_WARP, count_upto, step);
    if (lane >= step) {
      mass_upto += more_mass;
      count_upto += more_count;
    }
  }
  __syncthreads();  // the last call's results have been read
  if (lane == 31) {
    masses[warp] = mass_upto;
    counts[warp] = count_upto;
  }
  if (threadIdx.x == 0) found = {0, 0, 0, false};
  __syncthreads();
  for (unsigned i = 0; i < warp; i++) {
    mass_upto += masses[i];
    count_upto += counts[i];
  }
  const bool before = count_upto - count >= want || mass_upto - mass > limit;
  if (!before && (count_upto >= want || mass_upto > limit))
    found = {threadIdx.x, count_upto - count, mass_upto - mass, true};
  __syncthreads();
  return found;
}
constexpr unsigned NO_COUNT = 0xffffffffu;
constexpr u64 NO_MASS = ~0ull;

// The limit that a running sum must exceed for the random number's token: below the total, whatever is rounded.
__device__ __forceinline__ u64 limit_of(const Params& params, u64 total) {
  const u64 bits = u64(params.uniform[1]) << 32 | params.uniform[0];
  double uniform;
  memcpy(&uniform, &bits, sizeof uniform);
  const u64 limit = u64(uniform * double(total));
  return limit < total ? limit : total - 1;
}
// The limit for the shortest run that has the share `top_p` of the total.
__device__ __forceinline__ u64 nucleus_of(float top_p, u64 total) {
  const u64 least = u64(ceil(double(top_p) * double(total)));
  return least < 1 ? 0 : least > total ? total - 1 : least - 1;
}

// The first id of `span` at which the running sums of `of(id)` (a mass) exceed `limit`; all threads take part.
template <class F>
__device__ unsigned first_beyond(const Span& span, u64 limit, F&& of) {
  __shared__ unsigned token;
  const unsigned each = ceil_div(span.end - span.first, blockDim.x);
  const unsigned first = umin(span.first + threadIdx.x * each, span.end), end = umin(first + each, span.end);
  u64 mass = 0;
  for (unsigned id = first; id < end; id++) mass += of(id);
  const Crossing at = find_crossing(0, mass, NO_COUNT, limit);
  if (threadIdx.x == 0) token = NO_ROW;
  __syncthreads();
  if (at.found && threadIdx.x == at.thread) {
    u64 upto = at.mass;
    unsigned id = first;
    while (id < end && (upto += of(id)) <= limit) id++;
    token = id;
  }
  __syncthreads();
  return token;
}
