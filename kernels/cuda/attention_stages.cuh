// Keys and values on their way from the cache through shared memory, as both kernels of tiles take them.
#pragma once
#include "attention.cuh"

// Starts to copy a tile of which some pair sees something; zeros where no pair looks, as what lies there may be NaN, and
// beyond the head's elements. (No branches: where nothing is read, the address is that of a neighbour.)
template <class T, unsigned HD>
__device__ __forceinline__ void load_tile(T* to, const T* cache, unsigned tile, const Paging& paging, Visible visible) {
  constexpr unsigned CHUNKS = HD / 8, ROWS = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0, "");
  const unsigned thread = opaque(threadIdx.x), first = thread / CHUNKS, chunk = thread % CHUNKS;
  const bool inside = chunk * 8 < paging.head_dim;
  if (inside) cache += chunk * 8;
#pragma unroll 8
  for (unsigned i = 0; i < TILE / ROWS; i++) {
    const unsigned row = i * ROWS + first, position = tile * TILE + row;
    const unsigned near = min(max(position, visible.first), visible.end - 1);
    const T* from = cache + size_t(paging.row(near)) * paging.head_dim;
    cp_async16(to + chunk_at<HD>(row, chunk) * 8, from, inside && near == position);
  }
}

// A ring of BUFFERS tiles that the keys and the values of a tile take in turn. Stages count absolutely: 2 tile for the
// keys, 2 tile + 1 for the values. Each stage commits one group.
template <class T, unsigned HD, unsigned BUFFERS>
struct Stages {
  T* tiles;
  const T *k, *v;
  Paging paging;
  Visible visible;
  unsigned end_tile;

  __device__ __forceinline__ void start(unsigned first_tile) const {
#pragma unroll
    for (unsigned i = 0; i + 1 < BUFFERS; i++) load(2 * first_tile + i);
  }

  __device__ __forceinline__ const T* keys(unsigned tile) const { return next(2 * tile); }
  __device__ __forceinline__ const T* values(unsigned tile) const { return next(2 * tile + 1); }

  // The kernel ends with no copy on its way.
  __device__ __forceinline__ void finish() const { cp_async_wait<0>(); }

  // Waits for a stage and starts another in the buffer of the stage before it: behind the barrier every thread has done
  // with that one, and sees what all threads copied for this one.
  __device__ __forceinline__ const T* next(unsigned stage) const {
    cp_async_wait<BUFFERS - 2>();
    __syncthreads();
    load(stage + BUFFERS - 1);
    return tiles + stage % BUFFERS * TILE * HD;
  }

  __device__ __forceinline__ void load(unsigned stage) const {
    if (stage < 2 * end_tile)
      load_tile<T, HD>(tiles + stage % BUFFERS * TILE * HD, stage % 2 == 0 ? k : v, stage / 2, paging, visible);
    cp_async_commit();
  }
};
