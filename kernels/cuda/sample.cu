// The best token of a row, and a token of a row that does not truncate; how far the candidates of one that does reach.
#include "sample_weights.cuh"

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
