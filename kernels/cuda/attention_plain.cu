// Paged attention without tensor cores, of any type and width: a block takes one row and query head.
#include "attention.cuh"

// Warp w takes 32 keys of every 128, counted from the first that the row sees; a lane scores one key, then adds up some
// elements of the head. Shared memory: f32 [5, head_dim], the query and each warp's values.
template <class T>
__device__ __forceinline__ void attend_plain(T* out, const T* q, const T* k, const T* v, const unsigned* words,
                                             const unsigned* items, unsigned kv_heads, unsigned group, unsigned head_dim,
                                             unsigned ld, unsigned block_size, unsigned magic, unsigned shift, float scale,
                                             unsigned window) {
  __shared__ float weights[WARPS][32], tops[WARPS], sums[WARPS];
  __shared__ size_t places[WARPS][32];
  DYN_SMEM(float, query);
  const unsigned head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Item item = item_at(items, blockIdx.y);
  const unsigned row = item.first_pair / group;
  const Visible visible = PairRange(item, item.first_pair, 1, group, window).any;
  const Paging paging{words, item.table, kv_heads, head / group, head_dim, block_size, magic, shift};
  q += size_t(item.first_row + row) * ld + head * head_dim;
  out += size_t(item.first_row + row) * ld + head * head_dim;
  float* const values = query + (1 + warp) * head_dim;
  for (unsigned i = threadIdx.x; i < head_dim; i += blockDim.x) query[i] = to_float(q[i]);
  for (unsigned i = lane; i < head_dim; i += 32) values[i] = 0.f;
  __syncthreads();

  float top = minus_infinity(), sum = 0.f;
  for (unsigned first = visible.first + warp * 32; first < visible.end; first += WARPS * 32) {
    const unsigned key = first + lane, count = min(visible.end - first, 32u);
    float score = minus_infinity();
    size_t place = 0;
    if (lane < count) {
      place = size_t(paging.row(key)) * head_dim;
      float dot = 0.f;
      for (unsigned i = 0; i < head_dim; i++) dot += query[i] * to_float(k[place + i]);
      score = dot * scale;
    }
    const float next = fmaxf(top, warp_max(score)), decay = exp2f(top - next), weight = exp2f(score - next);
    top = next;
    sum = sum * decay + warp_sum(weight);
    __syncwarp();  // the weights of the keys before have been read
    weights[warp][lane] = weight;
    places[warp][lane] = place;
    __syncwarp();
    for (unsigned i = lane; i < head_dim; i += 32) {
      float value = values[i] * decay;
      for (unsigned j = 0; j < count; j++) value += weights[warp][j] * to_float(v[places[warp][j] + i]);
      values[i] = value;
    }
  }
  if (lane == 0) {
    tops[warp] = top;
    sums[warp] = sum;
  }
  __syncthreads();

  float highest = tops[0], scales[WARPS], all = 0.f;
  for (unsigned w = 1; w < WARPS; w++) highest = fmaxf(highest, tops[w]);
  for (unsigned w = 0; w < WARPS; w++) {
    // A warp without keys weighs nothing; without any keys (padding) there is no highest.
    scales[w] = tops[w] == minus_infinity() ? 0.f : exp2f(tops[w] - highest);
    all += sums[w] * scales[w];
  }
  for (unsigned i = threadIdx.x; i < head_dim; i += blockDim.x) {
    float value = 0.f;
    for (unsigned w = 0; w < WARPS; w++) value += query[(1 + w) * head_dim + i] * scales[w];
    out[i] = from_float<T>(attended(value, inverse(all)));
  }
  if (head + 1 == kv_heads * group) pad_row(out, kv_heads * group * head_dim, head_dim, ld, threadIdx.x, blockDim.x);
}

#define FOR_TYPE(T, suffix)                                                                                            \
  extern "C" __global__ void __launch_bounds__(THREADS, 8) attention_plain_##suffix(                                   \
      T* __restrict__ out, const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,                  \
      const unsigned* __restrict__ words, const unsigned* __restrict__ items, unsigned kv_heads, unsigned group,       \
      unsigned head_dim, unsigned ld, unsigned block_size, unsigned magic, unsigned shift, float scale,                \
      unsigned window) {                                                                                               \
    attend_plain<T>(out, q, k, v, words, items, kv_heads, group, head_dim, ld, block_size, magic, shift, scale,        \
                    window);                                                                                           \
  }                                                                                                                    \
  EXPORT_KERNEL(attention_plain_##suffix)
FOR_TYPE(float, f32)
FOR_TYPE(bf16, bf16)
FOR_TYPE(f16, f16)
#undef FOR_TYPE
