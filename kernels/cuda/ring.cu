// Rows of the capture ring, gathered before they go to the host.
#include "common.cuh"

constexpr unsigned GATHER_BLOCK = 256;
constexpr unsigned GATHER_EACH = 4;  // loads of a thread before its first store: latency is what a gather waits for

// out[i] = ring[slots[i]]: rows of `units` elements of type T, `n * units` elements in all.
template <class T>
__device__ void gather(T* out, const T* ring, const unsigned* slots, unsigned units, unsigned all) {
  const unsigned first = blockIdx.x * (GATHER_BLOCK * GATHER_EACH) + threadIdx.x;
  T held[GATHER_EACH];
#pragma unroll
  for (unsigned j = 0; j < GATHER_EACH; j++) {
    const unsigned at = first + j * GATHER_BLOCK;
    if (at < all) held[j] = ring[size_t(slots[at / units]) * units + at % units];
  }
#pragma unroll
  for (unsigned j = 0; j < GATHER_EACH; j++) {
    const unsigned at = first + j * GATHER_BLOCK;
    if (at < all) out[at] = held[j];
  }
}

#define FOR_WIDTH(T, bytes)                                                                                            \
  extern "C" __global__ void ring_gather_##bytes(T* __restrict__ out, const T* __restrict__ ring,                      \
                                                 const unsigned* __restrict__ slots, unsigned units, unsigned all) {   \
    gather<T>(out, ring, slots, units, all);                                                                           \
  }                                                                                                                    \
  EXPORT_KERNEL(ring_gather_##bytes)
FOR_WIDTH(uint4, 16)
FOR_WIDTH(uint2, 8)
FOR_WIDTH(unsigned, 4)
FOR_WIDTH(unsigned short, 2)
FOR_WIDTH(unsigned char, 1)
#undef FOR_WIDTH
