// From rows as a checkpoint stores them to packed weights (packed_index in common.cuh).
#include "common.cuh"

// Element (row, col) of the source lies at row * row_stride + col * col_stride; it goes to row first + row.
template <class To, class From>
__device__ void pack(To* out, const From* from, unsigned first, unsigned rows, unsigned cols, unsigned row_stride,
                     unsigned col_stride, unsigned cols16) {
  const unsigned col = blockIdx.x * blockDim.x + threadIdx.x;
  if (col >= cols) return;
  for (unsigned row = blockIdx.y; row < rows; row += gridDim.y)
    out[packed_index(first + row, col, cols16)] =
        from_float<To>(to_float(from[size_t(row) * row_stride + size_t(col) * col_stride]));
}

#define FOR_TYPES(To, to, From, from_)                                                                                  \
  extern "C" __global__ void pack_##to##_from_##from_(To* __restrict__ out, const From* __restrict__ from, unsigned first, \
                                                      unsigned rows, unsigned cols, unsigned row_stride,               \
                                                      unsigned col_stride, unsigned cols16) {                          \
    pack<To, From>(out, from, first, rows, cols, row_stride, col_stride, cols16);                                      \
  }                                                                                                                    \
  EXPORT_KERNEL(pack_##to##_from_##from_)
#define FOR_TYPE(To, to) FOR_TYPES(To, to, float, f32) FOR_TYPES(To, to, bf16, bf16) FOR_TYPES(To, to, f16, f16)
FOR_TYPE(float, f32)
FOR_TYPE(bf16, bf16)
FOR_TYPE(f16, f16)
#undef FOR_TYPE
#undef FOR_TYPES
