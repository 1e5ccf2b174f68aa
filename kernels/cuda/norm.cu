// Rows of the residual stream: their tokens, embedding, norms, gated activation.
#include "common.cuh"

// x[row] = table[ids[row]], f32 [n, width]; the table is packed.
template <class T>
__device__ void embed(float* x, const T* table, const unsigned* ids, unsigned width, unsigned cols16) {
  const unsigned row = blockIdx.x, id = ids[row];
  for (unsigned col = threadIdx.x; col < width; col += blockDim.x)
    x[size_t(row) * width + col] = to_float(table[packed_index(id, col, cols16)]);
}

// ids[i] = the token that row sources[i] - first of the samples chose, for sources in [first, first + len). A row that chose
// none counts as token 0: whoever sees that its request has failed drops what follows.
extern "C" __global__ void take_sampled(unsigned* __restrict__ ids, const unsigned* __restrict__ sources,
                                        const unsigned* __restrict__ samples, unsigned row_words, unsigned first,
                                        unsigned len, unsigned n) {
  const unsigned row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= n || sources[row] - first >= len) return;
  const unsigned token = samples[size_t(sources[row] - first) * row_words];
  ids[row] = token == 0xFFFFFFFFu ? 0 : token;
}
EXPORT_KERNEL(take_sampled)

// out[i] = x[rows[i]] + addition[rows[i]], f32 [n, width]; without an addition, x alone.
extern "C" __global__ void select_rows(float* __restrict__ out, const float* __restrict__ x, const float* __restrict__ addition,
                                       const unsigned* __restrict__ rows, unsigned width) {
  const size_t to = size_t(blockIdx.x) * width, from = size_t(rows[blockIdx.x]) * width;
  for (unsigned col = threadIdx.x; col < width; col += blockDim.x)
    out[to + col] = x[from + col] + (addition == nullptr ? 0.f : addition[from + col]);
}
EXPORT_KERNEL(select_rows)

// x += addition; out = x / rms(x) * weight. x and addition f32 [n, width], out T [n, ld], zeros beyond the width.
template <class T>
__device__ void add_rms_norm(T* out, float* x, const float* addition, const float* weight, float eps, unsigned width,
                             unsigned ld) {
  __shared__ float part[32];
  x += size_t(blockIdx.x) * width;
  out += size_t(blockIdx.x) * ld;
  float sum = 0.f;
  for (unsigned col = threadIdx.x; col < width; col += blockDim.x) {
    float value = x[col];
    if (addition != nullptr) x[col] = value += addition[size_t(blockIdx.x) * width + col];
    sum += value * value;
  }
  const float scale = rsqrtf(block_sum(sum, part) / width + eps);
  for (unsigned col = threadIdx.x; col < ld; col += blockDim.x)
    out[col] = from_float<T>(col < width ? x[col] * scale * weight[col] : 0.f);
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

// out = silu(gate) * up: x f32 [n, 2 * width], gate before up; out T [n, ld], zeros beyond the width.
template <class T>
__device__ void silu_and_mul(T* out, const float* x, unsigned width, unsigned ld) {
  x += size_t(blockIdx.x) * 2 * width;
  for (unsigned col = threadIdx.x; col < ld; col += blockDim.x)
    out[size_t(blockIdx.x) * ld + col] = from_float<T>(col < width ? silu(x[col]) * x[width + col] : 0.f);
}

#define FOR_TYPE(T, suffix)                                                                                            \
  extern "C" __global__ void embed_##suffix(float* __restrict__ x, const T* __restrict__ table,                        \
                                            const unsigned* __restrict__ ids, unsigned width, unsigned cols16) {       \
    embed<T>(x, table, ids, width, cols16);                                                                            \
  }                                                                                                                    \
  EXPORT_KERNEL(embed_##suffix)                                                                                        \
  extern "C" __global__ void add_rms_norm_##suffix(T* __restrict__ out, float* __restrict__ x,                         \
                                                   const float* __restrict__ addition, const float* __restrict__ weight, \
                                                   float eps, unsigned width, unsigned ld) {                           \
    add_rms_norm<T>(out, x, addition, weight, eps, width, ld);                                                         \
  }                                                                                                                    \
  EXPORT_KERNEL(add_rms_norm_##suffix)                                                                                 \
  extern "C" __global__ void silu_and_mul_##suffix(T* __restrict__ out, const float* __restrict__ x, unsigned width,   \
                                                   unsigned ld) {                                                      \
    silu_and_mul<T>(out, x, width, ld);                                                                                \
  }                                                                                                                    \
  EXPORT_KERNEL(silu_and_mul_##suffix)
FOR_TYPE(float, f32)
FOR_TYPE(bf16, bf16)
FOR_TYPE(f16, f16)
#undef FOR_TYPE
