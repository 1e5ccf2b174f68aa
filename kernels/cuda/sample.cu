// From logits to tokens, so that only token ids and logprobs cross to the host.
//
// Weights are exp(logit - max) as whole multiples of 2^-44: their sums are exact whatever the order, so any number of
// blocks gives the same bits. What a sum loses against f64 is below 2^-26 of it for 2^18 tokens, less than the last bit of
// an f32 exp. A logit 32 below the best weighs nothing.
//
// Blocks of a row work on parts of the vocabulary; the last to arrive goes on with what they found.
#include "common.cuh"

using u64 = unsigned long long;

constexpr unsigned THREADS = 256;
constexpr unsigned BUCKETS = 1024;     // 32 a unit of distance from the best logit
constexpr float PER_UNIT = 32.f;
constexpr unsigned LIST = 2048;        // candidates that are sorted at once
constexpr unsigned CHUNK = 4096;       // tokens of a block of `sample_logprobs`
constexpr unsigned MAX_TOP = 20;

struct Params {
  float temperature;
  unsigned top_k;  // 0 is off
  float top_p, ln_min_p;
  unsigned uniform[2];  // an f64's halves
  unsigned greedy;
  unsigned logprobs;  // 0: none; else 1 + how many of the best tokens
  unsigned row;       // of the logits
  unsigned given;     // a token to be scored, and none is chosen; NO_ROW: none is given
};

enum Mode : unsigned { DONE, BY_LIST, BY_LEVELS };

struct RowState {
  unsigned tickets[4];
  float max;
  unsigned argmax, is_nan, mode;
  unsigned kept, end_bucket, listed, above;
  u64 mass, raw;
};

// What goes to the host, u32 [m, 4 + 2 * top].
struct Out {
  unsigned* words;
  unsigned top;
  __device__ unsigned* row(unsigned at) const { return words + size_t(at) * (4 + 2 * top); }
};
enum OutWord : unsigned { TOKEN, IS_NAN, LOGPROB, RANK, TOP };

// True in every thread of the block that arrives last at the row; it sees what the others wrote before.
__device__ __forceinline__ bool arrives_last(unsigned* ticket) {
  __shared__ unsigned arrived;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) arrived = atomicAdd(ticket, 1u);
  __syncthreads();
  __threadfence();
  return arrived == gridDim.x - 1;
}

// The block's part of the vocabulary.
struct Span {
  unsigned first, end;
  __device__ Span(unsigned vocab, unsigned block, unsigned blocks) {
    const unsigned each = ceil_div(vocab, blocks);
    first = umin(block * each, vocab);
    end = umin(first + each, vocab);
  }
};

__device__ __forceinline__ u64 fixed(float weight) { return weight > 0.f ? u64(weight * 0x1p44f) : 0; }

// Order of f32 totals: larger first when compared as integers.
__device__ __forceinline__ unsigned order_key(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ float of_key(unsigned key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

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

template <class T>
__device__ __forceinline__ T warp_add(T x) {
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(FULL_WARP, x, step);
  return x;
}

// Where running sums over the threads first have `want` counts, or a mass beyond `limit`.
struct Crossing {
  unsigned thread, count;  // the sums before it
  u64 mass;
  bool found;
};
__device__ Crossing find_crossing(unsigned count, u64 mass, unsigned want, u64 limit) {
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

// Best logit, its lowest id, NaNs; greedy tokens.
extern "C" __global__ void __launch_bounds__(THREADS) sample_max(const float* __restrict__ logits, const Params* params_,
                                                                 RowState* states, float* best_, unsigned* best_ids_,
                                                                 unsigned* out_, unsigned top, unsigned vocab) {
  __shared__ float part[THREADS / 32];
  __shared__ unsigned part_ids[THREADS / 32], part_nan[THREADS / 32];
  const unsigned row = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Params params = params_[row];
  const float* x = logits + size_t(params.row) * vocab;
  RowState& state = states[row];
  float* best = best_ + size_t(row) * gridDim.x;
  unsigned* best_ids = best_ids_ + size_t(row) * gridDim.x;
  float max = -INFINITY;
  unsigned id = NO_ROW, is_nan = 0;
  auto take = [&](float other, unsigned other_id) {
    if (other > max || (other == max && other_id < id)) {
      max = other;
      id = other_id;
    }
  };
  auto reduce = [&] {
    for (int step = 16; step > 0; step >>= 1) {
      const float other = __shfl_xor_sync(FULL_WARP, max, step);
      const unsigned other_id = __shfl_xor_sync(FULL_WARP, id, step);
      take(other, other_id);
    }
    is_nan = __any_sync(FULL_WARP, is_nan);
    __syncthreads();
    if (lane == 0) {
      part[warp] = max;
      part_ids[warp] = id;
      part_nan[warp] = is_nan;
    }
    __syncthreads();
    for (unsigned i = 0; i < THREADS / 32; i++) {
      take(part[i], part_ids[i]);
      is_nan |= part_nan[i];
    }
  };
  const Span span(vocab, blockIdx.x, gridDim.x);
#pragma unroll 4
  for (unsigned at = span.first + threadIdx.x; at < span.end; at += THREADS) {
    const float value = x[at];
    is_nan |= value != value;
    if (value > max) {
      max = value;
      id = at;
    }
  }
  reduce();
  if (threadIdx.x == 0) {
    best[blockIdx.x] = max;
    best_ids[blockIdx.x] = id;
    if (is_nan) atomicOr(&state.is_nan, 1u);
  }
  if (!arrives_last(&state.tickets[0])) return;
  max = -INFINITY;
  id = NO_ROW;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += THREADS) take(best[i], best_ids[i]);
  reduce();
  if (threadIdx.x == 0) {
    state.max = max;
    state.argmax = id;
    unsigned* out = Out{out_, top}.row(row);
    // Of a row whose best logit is infinite nothing can be sampled, as every weight is NaN.
    out[TOKEN] = params.given != NO_ROW ? params.given : params.greedy ? id : NO_ROW;
    out[IS_NAN] = *(volatile unsigned*)&state.is_nan;
  }
}
EXPORT_KERNEL(sample_max)

// Sums of weights; of rows that truncate, by distance from the best logit. Rows that do not are sampled here, in id order.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    sample_masses(const float* __restrict__ logits, const Params* params_, RowState* states, u64* masses_,
                  unsigned* counts_, u64* bucket_masses_, unsigned* out_, unsigned top, unsigned vocab,
                  unsigned list_limit) {
  __shared__ unsigned counts[BUCKETS], low[BUCKETS], high[BUCKETS];
  __shared__ u64 part_mass[THREADS / 32], part_raw[THREADS / 32];
  __shared__ unsigned part_kept[THREADS / 32];
  const unsigned row = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Params params = params_[row];
  RowState& state = states[row];
  const float* x = logits + size_t(params.row) * vocab;
  const Scaled scaled(x, params, state);
  const bool sampled = !params.greedy && fabsf(scaled.max) < INFINITY;
  const bool truncates = sampled && (params.top_k > 0 || params.top_p < 1.f);
  if (!sampled && params.logprobs == 0) return;
  const float raw_max = state.max;
  unsigned* row_counts = counts_ + size_t(row) * BUCKETS;
  u64* row_masses = bucket_masses_ + size_t(row) * BUCKETS;
  u64* masses = masses_ + size_t(row) * gridDim.x;
  if (truncates) {
    for (unsigned i = threadIdx.x; i < BUCKETS; i += THREADS) counts[i] = low[i] = high[i] = 0;
    __syncthreads();
  }

  u64 mass = 0, raw = 0;
  unsigned kept = 0;
  const Span span(vocab, blockIdx.x, gridDim.x);
#pragma unroll 2
  for (unsigned id = span.first + threadIdx.x; id < span.end; id += THREADS) {
    if (params.logprobs != 0) raw += fixed(expf(x[id] - raw_max));
    if (!sampled) continue;
    const float value = scaled.at(id);
    if (!(value > -INFINITY)) continue;
    kept++;
    const float distance = scaled.max - value;
    const u64 weight = scaled.weight(value);
    mass += weight;
    const unsigned bucket = distance < BUCKETS / PER_UNIT ? bucket_of(distance) : BUCKETS;
    if (!truncates || bucket >= BUCKETS) continue;
    atomicAdd(&counts[bucket], 1u);
    // 64 bits in two halves, as shared memory adds 32 at once: whoever overflows the low one carries.
    const unsigned add = unsigned(weight), old = atomicAdd(&low[bucket], add);
    const unsigned carried = unsigned(weight >> 32) + (old + add < old ? 1u : 0u);
    if (carried != 0) atomicAdd(&high[bucket], carried);
  }
  mass = warp_add(mass);
  raw = warp_add(raw);
  kept = warp_add(kept);
  if (lane == 0) {
    part_mass[warp] = mass;
    part_raw[warp] = raw;
    part_kept[warp] = kept;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned i = 1; i < THREADS / 32; i++) {
      mass += part_mass[i];
      raw += part_raw[i];
      kept += part_kept[i];
    }
    masses[blockIdx.x] = mass;
    atomicAdd(&state.mass, mass);
    atomicAdd(&state.raw, raw);
    atomicAdd(&state.kept, kept);
  }
  if (truncates)
    for (unsigned i = threadIdx.x; i < BUCKETS; i += THREADS)
      if (counts[i] != 0) {
        atomicAdd(&row_counts[i], counts[i]);
        atomicAdd(&row_masses[i], u64(high[i]) << 32 | low[i]);
      }
  if (!arrives_last(&state.tickets[1]) || !sampled) return;

  const u64 total = *(volatile u64*)&state.mass;
  kept = *(volatile unsigned*)&state.kept;
  const bool cuts_k = params.top_k > 0 && params.top_k < kept;
  unsigned* out = Out{out_, top}.row(row);
  if (!cuts_k && !(params.top_p < 1.f)) {
    u64 limit = limit_of(params, total);
    // Which block's part holds the token: each thread adds up neighbours.
    const unsigned each = ceil_div(gridDim.x, THREADS), first = threadIdx.x * each;
    mass = 0;
    for (unsigned i = first; i < umin(first + each, gridDim.x); i++) mass += masses[i];
    const Crossing at = find_crossing(0, mass, NO_COUNT, limit);
    unsigned block = at.thread * each;
    limit -= at.mass;
    while (masses[block] <= limit) limit -= masses[block++];
    const Span part(vocab, block, gridDim.x);
    const unsigned token = first_beyond(part, limit, [&](unsigned id) {
      const float value = scaled.at(id);
      return value > -INFINITY ? scaled.weight(value) : 0;
    });
    if (threadIdx.x == 0) out[TOKEN] = token;
    return;
  }
  // How far the candidates reach. With top_k the nucleus needs the mass of all k, however far it reaches itself.
  constexpr unsigned EACH = BUCKETS / THREADS;
  unsigned count[EACH], all = 0;
  u64 in_bucket[EACH];
  mass = 0;
#pragma unroll
  for (unsigned i = 0; i < EACH; i++) {
    count[i] = row_counts[threadIdx.x * EACH + i];
    in_bucket[i] = row_masses[threadIdx.x * EACH + i];
    all += count[i];
    mass += in_bucket[i];
  }
  const unsigned want = cuts_k ? params.top_k : NO_COUNT;
  const u64 limit = cuts_k ? NO_MASS : nucleus_of(params.top_p, total);
  const Crossing at = find_crossing(all, mass, want, limit);
  if (at.found ? threadIdx.x == at.thread : threadIdx.x == THREADS - 1) {
    unsigned upto = at.count, bucket = 0;
    u64 mass_upto = at.mass;
    bool reached = false;
#pragma unroll
    for (unsigned i = 0; i < EACH; i++)
      if (!reached) {
        upto += count[i];
        mass_upto += in_bucket[i];
        bucket = threadIdx.x * EACH + i;
        reached = upto >= want || mass_upto > limit;
      }
    // Without a crossing, fewer than k tokens are near enough to have been counted: the levels count the others too.
    const bool fits = at.found && upto <= list_limit;
    state.end_bucket = bucket;
    state.mode = fits ? BY_LIST : BY_LEVELS;
  }
}
EXPORT_KERNEL(sample_masses)

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
