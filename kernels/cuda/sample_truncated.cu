// A token of a row that keeps the best `top_k` tokens or the share `top_p` alone.
#include "sample_weights.cuh"

constexpr unsigned LIST = 2048;  // candidates that are sorted at once

// Sorts descending; `size` is a power of two.
__device__ void sort(u64* list, unsigned size) {
  for (unsigned run = 2; run <= size; run <<= 1)
    for (unsigned step = run >> 1; step > 0; step >>= 1) {
      __syncthreads();
      for (unsigned i = threadIdx.x; i < size / 2; i += THREADS) {
        const unsigned a = i / step * 2 * step + i % step, b = a + step;
        const u64 x = list[a], y = list[b];
        if ((x < y) == ((a & run) == 0)) {
          list[a] = y;
          list[b] = x;
        }
      }
    }
  __syncthreads();
}

// Rows whose candidates are few: they are listed, sorted, and cut.
extern "C" __global__ void __launch_bounds__(THREADS)
    sample_list(const float* __restrict__ logits, const Params* params_, RowState* states, u64* lists, unsigned* out_,
                unsigned top, unsigned vocab) {
  __shared__ u64 sorted[LIST];
  const unsigned row = blockIdx.y;
  RowState& state = states[row];
  if (state.mode != BY_LIST) return;
  const Params params = params_[row];
  const float* x = logits + size_t(params.row) * vocab;
  const Scaled scaled(x, params, state);
  u64* list = lists + size_t(row) * LIST;
  const unsigned end_bucket = state.end_bucket;
  const Span span(vocab, blockIdx.x, gridDim.x);
#pragma unroll 4
  for (unsigned id = span.first + threadIdx.x; id < span.end; id += THREADS) {
    const float value = scaled.at(id);
    const float distance = scaled.max - value;
    if (distance < BUCKETS / PER_UNIT && bucket_of(distance) <= end_bucket)
      list[atomicAdd(&state.listed, 1u)] = u64(order_key(value)) << 32 | ~id;
  }
  if (!arrives_last(&state.tickets[2])) return;
  const unsigned listed = *(volatile unsigned*)&state.listed;
  unsigned size = 1;
  while (size < listed) size <<= 1;
  for (unsigned i = threadIdx.x; i < size; i += THREADS) sorted[i] = i < listed ? list[i] : 0;
  sort(sorted, size);

  const bool cuts_k = params.top_k > 0 && params.top_k < state.kept;
  const unsigned end = cuts_k ? umin(params.top_k, listed) : listed;
  constexpr unsigned EACH = LIST / THREADS;
  u64 weight[EACH], mass = 0;
#pragma unroll
  for (unsigned i = 0; i < EACH; i++) {
    const unsigned at = threadIdx.x * EACH + i;
    weight[i] = at < end ? scaled.weight(of_key(unsigned(sorted[at] >> 32))) : 0;
    mass += weight[i];
  }
  // The sum up to where the running sums exceed the limit.
  __shared__ u64 upto;
  __shared__ unsigned place;
  auto cut = [&](u64 limit) {
    const Crossing at = find_crossing(0, mass, NO_COUNT, limit);
    if (at.found && threadIdx.x == at.thread) {
      u64 sum = at.mass;
      bool reached = false;
#pragma unroll
      for (unsigned i = 0; i < EACH; i++)
        if (!reached) {
          sum += weight[i];
          place = threadIdx.x * EACH + i;
          reached = sum > limit;
        }
      upto = sum;
    }
    __syncthreads();
    return upto;
  };
  u64 total = *(volatile u64*)&state.mass;
  if (cuts_k) {
    __shared__ u64 part[THREADS / 32];
    const u64 in_warp = warp_add(mass);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = in_warp;
    __syncthreads();
    total = 0;
    for (unsigned i = 0; i < THREADS / 32; i++) total += part[i];
  }
  if (params.top_p < 1.f) total = cut(nucleus_of(params.top_p, total));
  cut(limit_of(params, total));
  if (threadIdx.x == 0) Out{out_, top}.row(row)[TOKEN] = ~unsigned(sorted[place]);
}
EXPORT_KERNEL(sample_list)

constexpr unsigned LEVEL_THREADS = 512;
constexpr unsigned LEVEL = 2048;  // values of the 11 bits of a key that a level decides

// Rows with more candidates than can be sorted: cuts are found bit by bit of the order, in several passes over the row.
extern "C" __global__ void __launch_bounds__(LEVEL_THREADS)
    sample_levels(const float* __restrict__ logits, const Params* params_, RowState* states, unsigned* out_, unsigned top,
                  unsigned vocab) {
  __shared__ unsigned counts[LEVEL], low[LEVEL], high[LEVEL];
  __shared__ unsigned key_bits;
  __shared__ unsigned found_count;
  __shared__ u64 found_mass;
  const unsigned row = blockIdx.x;
  const RowState& state = states[row];
  if (state.mode != BY_LEVELS) return;
  const Params params = params_[row];
  const Scaled scaled(logits + size_t(params.row) * vocab, params, state);

  // The tokens up to where the running sums, best token first, have `want` counts, or a mass beyond `limit`: those with a
  // larger key, and of those with this key the first `ties`, which weigh `mass` together.
  struct Cut {
    unsigned key, ties;
    u64 mass;
  };
  auto cut = [&](unsigned want, u64 limit) {
    unsigned prefix = 0, count_before = 0;
    u64 mass_before = 0;
    for (unsigned level = 0; level < 3; level++) {
      const unsigned shift = level == 0 ? 21 : level == 1 ? 10 : 0, decided = level == 0 ? 32 : level == 1 ? 21 : 10;
      __syncthreads();
      for (unsigned i = threadIdx.x; i < LEVEL; i += LEVEL_THREADS) counts[i] = low[i] = high[i] = 0;
      __syncthreads();
      for (unsigned id = threadIdx.x; id < vocab; id += LEVEL_THREADS) {
        const float value = scaled.at(id);
        if (!(value > -INFINITY)) continue;
        const unsigned key = order_key(value);
        if (decided < 32 && key >> decided != prefix) continue;
        // Best first.
        const unsigned bucket = LEVEL - 1 - (key >> shift & (LEVEL - 1) >> (level == 2 ? 1 : 0));
        const u64 weight = scaled.weight(value);
        atomicAdd(&counts[bucket], 1u);
        const unsigned add = unsigned(weight), old = atomicAdd(&low[bucket], add);
        const unsigned carried = unsigned(weight >> 32) + (old + add < old ? 1u : 0u);
        if (carried != 0) atomicAdd(&high[bucket], carried);
      }
      __syncthreads();
      constexpr unsigned EACH = LEVEL / LEVEL_THREADS;
      unsigned count = 0;
      u64 mass = 0;
      for (unsigned i = threadIdx.x * EACH; i < (threadIdx.x + 1) * EACH; i++) {
        count += counts[i];
        mass += u64(high[i]) << 32 | low[i];
      }
      const Crossing at = find_crossing(count, mass, want - count_before, limit - mass_before);
      if (threadIdx.x == at.thread) {
        unsigned upto = at.count, bucket = at.thread * EACH;
        u64 mass_upto = at.mass;
        for (;; bucket++) {
          const u64 here = u64(high[bucket]) << 32 | low[bucket];
          if (upto + counts[bucket] >= want - count_before || mass_upto + here > limit - mass_before) break;
          if (bucket + 1 == (at.thread + 1) * EACH) break;
          upto += counts[bucket];
          mass_upto += here;
        }
        const unsigned bits = LEVEL - 1 - bucket;
        key_bits = level == 0 ? bits : level == 1 ? prefix << 11 | bits : prefix << 10 | (bits & 1023);
        found_count = upto;
        found_mass = mass_upto;
      }
      __syncthreads();
      prefix = key_bits;
      count_before += found_count;
      mass_before += found_mass;
    }
    const u64 weight = scaled.weight(of_key(prefix));
    const unsigned ties = want != NO_COUNT ? want - count_before : unsigned((limit - mass_before) / weight) + 1;
    return Cut{prefix, ties, mass_before + ties * weight};
  };
  u64 total = state.mass;
  if (params.top_k > 0 && params.top_k < state.kept) total = cut(params.top_k, NO_MASS).mass;
  if (params.top_p < 1.f) total = cut(NO_COUNT, nucleus_of(params.top_p, total)).mass;
  const Cut last = cut(NO_COUNT, limit_of(params, total));
  const unsigned token = first_beyond(Span(vocab, 0, 1), last.ties - 1, [&](unsigned id) {
    const float value = scaled.at(id);
    return value > -INFINITY && order_key(value) == last.key ? 1ull : 0ull;
  });
  if (threadIdx.x == 0) Out{out_, top}.row(row)[TOKEN] = token;
}
EXPORT_KERNEL(sample_levels)
