// From logits to tokens, so that only token ids and logprobs cross to the host: what the kernels share.
//
// A row goes through `sample_max`, `sample_masses`, one of `sample_list` and `sample_levels` if it truncates, and
// `sample_logprobs` if it is scored. Blocks of a row work on parts of the vocabulary; the last to arrive goes on with what
// they found.
#pragma once
#include "common.cuh"

using u64 = unsigned long long;

constexpr unsigned THREADS = 256;

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

// Order of f32 totals: larger first when compared as integers.
__device__ __forceinline__ unsigned order_key(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ float of_key(unsigned key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

template <class T>
__device__ __forceinline__ T warp_add(T x) {
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(FULL_WARP, x, step);
  return x;
}
