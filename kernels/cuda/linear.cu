// out = x W^T + bias: x T [n, ld], W packed T [outs, K], out f32 [n, outs].
#include "wgmma.cuh"

struct Features {
  static constexpr unsigned PANELS = 1;
  float* out;
  const float* bias;  // or null
  unsigned outs, first, n;
  __device__ __forceinline__ void prepare() const {}
  __device__ __forceinline__ void put(unsigned panel, unsigned tile, const float (&sums)[1][4]) const {
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
      const unsigned feature = panel * 16 + lane / 4 + i / 2 * 8, token = first + tile * 8 + lane % 4 * 2 + i % 2;
      if (feature < outs && token < n)
        out[size_t(token) * outs + feature] = sums[0][i] + (bias != nullptr ? bias[feature] : 0.f);
    }
  }
};

// Blocks: panels along x, tokens along y.
template <class T, unsigned P, unsigned NT>
__device__ __forceinline__ void linear_split(float* out, const T* x, const T* weights, const float* bias, unsigned n,
                                             unsigned outs, unsigned ld, unsigned segment) {
  DYN_SMEM(unsigned char, smem);
  const unsigned row_bytes = ld * sizeof(T), first = blockIdx.y * NT * 8;
  const Weights w{reinterpret_cast<const unsigned char*>(weights), ceil_div(outs, 16), row_bytes / ROW_BYTES, segment};
  split_product<T, P, NT>(smem, w, Tokens{reinterpret_cast<const unsigned char*>(x), row_bytes}, RowRange{first, n},
                          Features{out, bias, outs, first, n});
}

// How many tiles of tokens are worked on together: their rows and the weights meet in the second-level cache.
constexpr unsigned BAND = 8;

// What a block takes where blocks along x are the tiles of a band, those of equal outputs together.
struct BandedTile {
  unsigned first, first_panel;
  __device__ __forceinline__ BandedTile(unsigned n, unsigned tokens, unsigned panels, unsigned tile_panels) {
    const unsigned tiles_m = ceil_div(panels, tile_panels), tiles_n = ceil_div(n, tokens);
    const unsigned band = blockIdx.x / (tiles_m * BAND) * BAND, width = umin(BAND, tiles_n - band);
    const unsigned within = blockIdx.x - band * tiles_m;
    first = (band + within % width) * tokens;
    first_panel = within / width * tile_panels;
  }
};

template <class T, unsigned WM, unsigned WN, unsigned P, unsigned NT>
__device__ __forceinline__ void linear_tile(float* out, const T* x, const T* weights, const float* bias, unsigned n,
                                            unsigned outs, unsigned ld, unsigned segment) {
  DYN_SMEM(unsigned char, smem);
  const unsigned row_bytes = ld * sizeof(T), panels = ceil_div(outs, 16);
  const BandedTile tile(n, WN * NT * 8, panels, WM * P);
  const Weights w{reinterpret_cast<const unsigned char*>(weights), panels, row_bytes / ROW_BYTES, segment};
  tile_product<T, WM, WN, P, NT>(smem, w, Tokens{reinterpret_cast<const unsigned char*>(x), row_bytes}, tile.first_panel,
                                 RowRange{tile.first, n}, Features{out, bias, outs, tile.first, n});
}

template <class T, unsigned N, unsigned H>
__device__ __forceinline__ void linear_wgmma(float* out, const T* x, const T* weights, const float* bias, unsigned n,
                                             unsigned outs, unsigned ld, unsigned segment) {
  DYN_SMEM(unsigned char, smem);
  const unsigned row_bytes = ld * sizeof(T), panels = ceil_div(outs, 16);
  const BandedTile tile(n, H * N, panels, 8);
  const Weights w{reinterpret_cast<const unsigned char*>(weights), panels, row_bytes / ROW_BYTES, segment};
  wgmma_product<T, N, H>(smem, w, Tokens{reinterpret_cast<const unsigned char*>(x), row_bytes}, tile.first_panel,
                         RowRange{tile.first, n}, Features{out, bias, outs, tile.first, n});
}

#define LINEAR(name, min_blocks, product, T, ...)                                                                      \
  extern "C" __global__ void __launch_bounds__(256, min_blocks)                                                        \
      name(float* __restrict__ out, const T* __restrict__ x, const T* __restrict__ weights,                            \
           const float* __restrict__ bias, unsigned n, unsigned outs, unsigned ld, unsigned segment) {                 \
    product<T, __VA_ARGS__>(out, x, weights, bias, n, outs, ld, segment);                                              \
  }                                                                                                                    \
  EXPORT_KERNEL(name)
#define FOR_TYPE(T, suffix)                                            \
  LINEAR(linear_split_16x8_##suffix, 3, linear_split, T, 1, 1)         \
  LINEAR(linear_split_16x16_##suffix, 2, linear_split, T, 1, 2)        \
  LINEAR(linear_split_16x32_##suffix, 2, linear_split, T, 1, 4)        \
  LINEAR(linear_split_16x64_##suffix, 1, linear_split, T, 1, 8)        \
  LINEAR(linear_split_32x8_##suffix, 2, linear_split, T, 2, 1)         \
  LINEAR(linear_split_32x16_##suffix, 2, linear_split, T, 2, 2)        \
  LINEAR(linear_split_32x32_##suffix, 2, linear_split, T, 2, 4)        \
  LINEAR(linear_split_32x64_##suffix, 1, linear_split, T, 2, 8)        \
  LINEAR(linear_tile_128x64_##suffix, 2, linear_tile, T, 4, 2, 2, 4)   \
  LINEAR(linear_tile_128x128_##suffix, 1, linear_tile, T, 2, 4, 4, 4)
FOR_TYPE(float, f32)
FOR_TYPE(bf16, bf16)
FOR_TYPE(f16, f16)
#undef FOR_TYPE
#define FOR_TYPE(T, suffix)                                         \
  LINEAR(linear_wgmma_128x64_##suffix, 2, linear_wgmma, T, 64, 1)   \
  LINEAR(linear_wgmma_128x128_##suffix, 1, linear_wgmma, T, 64, 2)  \
  LINEAR(linear_wgmma_128x160_##suffix, 1, linear_wgmma, T, 80, 2)
FOR_TYPE(bf16, bf16)
FOR_TYPE(f16, f16)
#undef FOR_TYPE
#undef LINEAR
