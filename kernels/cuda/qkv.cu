// What happens to a row of queries, keys and values before attention: norm, clamp, rotation, the store to the cache.
#include "common.cuh"

__device__ __forceinline__ float clamped(float x, float clip) {
  // Comparisons, not fminf: NaN stays NaN.
  return x > clip ? clip : x < -clip ? -clip : x;
}

// What one head of queries or keys goes through: x * scale * weight, clamped, rotated.
struct Turn {
  const float* x;
  const float* weight;  // null without a norm
  float scale, clip;
  __device__ __forceinline__ float at(unsigned i) const {
    return clamped(weight == nullptr ? x[i] : x[i] * scale * weight[i], clip);
  }
};

// A block per row of qkv f32 [n, (heads + 2 kv_heads) * head_dim], a warp per head. q goes to T [n, ld], zeros beyond
// the width; k and v go to the cache, T [num_blocks, kv_heads, block_size, head_dim], unless the slot is NO_ROW. The
// tables cos and sin are f32 [max_positions, half]; element i < half of a head turns with element i + half.
template <class T>
__device__ void qkv_rope_store(T* q, T* k, T* v, const float* qkv, const float* q_weight, const float* k_weight,
                               const float* cos, const float* sin, const unsigned* positions, const unsigned* slots,
                               unsigned heads, unsigned kv_heads, unsigned head_dim, unsigned half, unsigned ld,
                               unsigned block_size, unsigned per_head, float eps, float clip) {
  __shared__ float part[32];
  const unsigned row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const unsigned q_width = heads * head_dim, kv_width = kv_heads * head_dim;
  qkv += size_t(row) * (q_width + 2 * kv_width);
  q += size_t(row) * ld;
  cos += size_t(positions[row]) * half;
  sin += size_t(positions[row]) * half;

  float q_scale = 1.f, k_scale = 1.f;
  if (q_weight != nullptr && !per_head) {
    float q_sum = 0.f, k_sum = 0.f;
    for (unsigned i = threadIdx.x; i < q_width; i += blockDim.x) q_sum += qkv[i] * qkv[i];
    for (unsigned i = threadIdx.x; i < kv_width; i += blockDim.x) k_sum += qkv[q_width + i] * qkv[q_width + i];
    q_scale = rsqrtf(block_sum(q_sum, part) / q_width + eps);
    k_scale = rsqrtf(block_sum(k_sum, part) / kv_width + eps);
  }

  const unsigned slot = slots[row];
  for (unsigned head = warp; head < heads + 2 * kv_heads; head += warps) {
    const bool query = head < heads, value = head >= heads + kv_heads;
    if (!query && slot == NO_ROW) break;
    const float* x = qkv + head * head_dim;
    T* to = q + head * head_dim;
    if (!query) {
      const unsigned kv_head = (head - heads) % kv_heads;
      const size_t start = (size_t(slot / block_size) * kv_heads + kv_head) * block_size + slot % block_size;
      to = (value ? v : k) + start * head_dim;
    }
    if (value) {
      for (unsigned i = lane; i < head_dim; i += 32) to[i] = from_float<T>(clamped(x[i], clip));
      continue;
    }
    Turn turn{x, query ? q_weight : k_weight, query ? q_scale : k_scale, clip};
    if (turn.weight != nullptr && per_head) {
      float sum = 0.f;
      for (unsigned i = lane; i < head_dim; i += 32) sum += x[i] * x[i];
      turn.scale = rsqrtf(warp_sum(sum) / head_dim + eps);
    } else if (turn.weight != nullptr) {
      turn.weight += (query ? head : head - heads) * head_dim;
    }
    for (unsigned i = lane; i < half; i += 32) {
      const float a = turn.at(i), b = turn.at(i + half), c = cos[i], s = sin[i];
      to[i] = from_float<T>(a * c - b * s);
      to[i + half] = from_float<T>(b * c + a * s);
    }
    for (unsigned i = 2 * half + lane; i < head_dim; i += 32) to[i] = from_float<T>(turn.at(i));
  }
  for (unsigned i = q_width + threadIdx.x; i < ld; i += blockDim.x) q[i] = from_float<T>(0.f);
}

#define FOR_TYPE(T, suffix)                                                                                            \
  extern "C" __global__ void qkv_rope_store_##suffix(                                                                  \
      T* __restrict__ q, T* __restrict__ k, T* __restrict__ v, const float* __restrict__ qkv,                          \
      const float* __restrict__ q_weight, const float* __restrict__ k_weight, const float* __restrict__ cos,           \
      const float* __restrict__ sin, const unsigned* __restrict__ positions, const unsigned* __restrict__ slots,       \
      unsigned heads, unsigned kv_heads, unsigned head_dim, unsigned half, unsigned ld, unsigned block_size,           \
      unsigned per_head, float eps, float clip) {                                                                      \
    qkv_rope_store<T>(q, k, v, qkv, q_weight, k_weight, cos, sin, positions, slots, heads, kv_heads, head_dim, half,   \
                      ld, block_size, per_head, eps, clip);                                                            \
  }                                                                                                                    \
  EXPORT_KERNEL(qkv_rope_store_##suffix)
FOR_TYPE(float, f32)
FOR_TYPE(bf16, bf16)
FOR_TYPE(f16, f16)
#undef FOR_TYPE
