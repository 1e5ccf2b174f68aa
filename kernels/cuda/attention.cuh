// Attention of 16 (row, head) pairs over tiles of 64 keys: what the kernels of a whole context and of one split share.
//
// The bits of a row must not depend on which kernel computes it, with which rows beside it. So:
// - Keys are cut at absolute positions: splits of SPLIT, tiles of TILE. Within a split the tiles come in ascending order
//   with a running maximum; the splits' states are merged in ascending order (`Merge`).
// - A tile is always multiplied whole. Positions a row does not see weigh exactly zero, and a tile of which it sees
//   nothing leaves its state as it is: the maximum stays, all is multiplied by exp2(0) = 1, zeros are added.
// - A tile's weights are added up in quarters of 16 keys, then the quarters in order, so that four warps may share a tile.
// - Sums and products are spelled out (__fmaf_rn): the compiler may not fuse them in one kernel and not in the other.
#pragma once
#include "common.cuh"

constexpr unsigned TILE = 64;
constexpr unsigned SPLIT = 512;
constexpr unsigned TILES_OF_SPLIT = SPLIT / TILE;
constexpr unsigned LANE_PAIRS = 16;  // (row, head) pairs of one product
constexpr unsigned WARPS = 4;
constexpr unsigned THREADS = WARPS * 32;  // of a block, in every kernel

#ifdef __CUDACC__
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The same number, without the compiler knowing: what is read with it is read again, not kept in registers.
__device__ __forceinline__ unsigned opaque(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}
#else
inline unsigned opaque(unsigned x) { return x; }
inline float exp2_approx(float x) { return exp2f(x); }
#endif

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// Some pairs of one sequence, as `plan.rs` writes them. Pair p is row p / group, query head p % group of the group.
struct Item {
  unsigned first_row;       // the sequence's first row of the call
  unsigned rows;            // of the sequence; 0 if it is padding, whose row gets zeros
  unsigned first_position;  // of the first row
  unsigned table;           // where the block table starts, in words of the plan
  unsigned first_pair;
  unsigned first_partial;
  unsigned first_split;
  unsigned splits;
};

__device__ __forceinline__ Item item_at(const unsigned* items, unsigned index) {
  const unsigned* at = items + size_t(index) * 8;
  return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]};
}

// First key that the query at a position sees.
__device__ __forceinline__ unsigned first_visible(unsigned position, unsigned window) {
  return position + 1 > window ? position + 1 - window : 0;
}

// Keys first..end of a sequence.
struct Visible {
  unsigned first, end;
};

// Pairs from..to of an item as far as they exist: what any of them sees, and what all of them see.
struct PairRange {
  unsigned from, to;  // absolute, clipped
  Visible any, all;
  __device__ __forceinline__ PairRange(const Item& item, unsigned first, unsigned count, unsigned group, unsigned window) {
    const unsigned pairs = item.rows * group;
    from = first < pairs ? first : pairs;
    to = first + count < pairs ? first + count : pairs;
    any = all = {0, 0};
    if (from < to) {
      const unsigned low = item.first_position + from / group, high = item.first_position + (to - 1) / group;
      any = {first_visible(low, window), high + 1};
      all = {first_visible(high, window), low + 1};
    }
  }
};

// The keys or values of one head of a sequence in the cache, T [num_blocks, kv_heads, block_size, head_dim]. A cache has
// fewer than 2^32 rows of head_dim elements, as the launcher checks.
struct Paging {
  const unsigned* words;
  unsigned table, kv_heads, head, head_dim, block_size;
  unsigned magic, shift;  // position / block_size = (umulhi(position, magic) + position) >> shift

  // Rows before that of a position.
  __device__ __forceinline__ unsigned row(unsigned position) const {
    const unsigned block = (__umulhi(position, magic) + position) >> shift;
    return (words[table + block] * kv_heads + head) * block_size + (position - block * block_size);
  }
};

// Tiles in shared memory are T [TILE, HD] in 16-byte chunks. Eight neighbouring rows of one chunk, as ldmatrix reads
// them, lie in different banks.
template <unsigned HD>
__device__ __forceinline__ unsigned chunk_at(unsigned row, unsigned chunk) {
  static_assert(HD == 32 || HD % 64 == 0, "");
  return row * (HD / 8) + (HD == 32 ? chunk ^ (row / 2 % 4) : chunk ^ (row % 8));
}

// A row of queries as the first operand of mma, 16 elements from `col`: this lane's registers of rows g and g + 8, which
// are null where there is no such pair.
template <class T>
__device__ __forceinline__ void query_fragment(unsigned (&a)[4], const T* low, const T* high, unsigned col, unsigned head_dim) {
  const unsigned at = col + threadIdx.x % 4 * 2;
#pragma unroll
  for (unsigned i = 0; i < 4; i++) {
    const T* row = i % 2 == 0 ? low : high;
    const unsigned c = at + i / 2 * 8;
    a[i] = row != nullptr && c < head_dim ? *reinterpret_cast<const unsigned*>(row + c) : 0;
  }
}

// s += a k^T for M times 16 pairs and 16 * N keys from row `first` of the tile, 16 elements of the head from step * 16.
template <class T, unsigned HD, unsigned M, unsigned N>
__device__ __forceinline__ void add_scores(float (&s)[M][2 * N][4], const unsigned (&a)[M][4], const T* keys, unsigned lane,
                                           unsigned first, unsigned step) {
  const unsigned row = first + lane / 16 * 8 + lane % 8, chunk = step * 2 + lane / 8 % 2;
#pragma unroll
  for (unsigned n = 0; n < N; n++) {
    unsigned b[4];
    ldmatrix_x4(b, keys + chunk_at<HD>(row + n * 16, chunk) * 8);
    const unsigned left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
    for (unsigned m = 0; m < M; m++) {
      mma<T>(s[m][2 * n], a[m], left);
      mma<T>(s[m][2 * n + 1], a[m], right);
    }
  }
}

// o += p v for 16 * N elements of the head: 16 from each of `first`, `first + stride`, ... (in sixteens).
template <class T, unsigned HD, unsigned M, unsigned N>
__device__ __forceinline__ void add_values(float (&o)[M][2 * N][4], const unsigned (&p)[M][4], const T* values, unsigned lane,
                                           unsigned step, unsigned first, unsigned stride) {
  const unsigned row = step * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
  for (unsigned n = 0; n < N; n++) {
    unsigned b[4];
    ldmatrix_x4_trans(b, values + chunk_at<HD>(row, (first + n * stride) * 2 + lane / 16) * 8);
    const unsigned left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
    for (unsigned m = 0; m < M; m++) {
      mma<T>(o[m][2 * n], p[m], left);
      mma<T>(o[m][2 * n + 1], p[m], right);
    }
  }
}

// From products to scores in powers of two, minus infinity where a row does not look, and each row's maximum over the
// 8 * N keys from `key`, on all four lanes of the row. `end_of` says where the keys that rows g and g + 8 see end: 0 where
// there is no row.
template <unsigned N, class End>
__device__ __forceinline__ void mask_scores(float (&s)[N][4], float (&top)[2], float scale, unsigned key, bool whole,
                                            const End& end_of, unsigned window) {
  const unsigned first = key + threadIdx.x % 4 * 2;
  top[0] = top[1] = minus_infinity();
#pragma unroll
  for (unsigned n = 0; n < N; n++)
#pragma unroll
    for (unsigned i = 0; i < 4; i++) s[n][i] = __fmul_rn(s[n][i], scale);
  if (!whole) {
#pragma unroll
    for (unsigned i = 0; i < 2; i++) {
      const unsigned end = end_of(i), begin = end > window ? end - window : 0;
#pragma unroll
      for (unsigned n = 0; n < 2 * N; n++) {
        const unsigned at = first + n / 2 * 8 + n % 2;
        if (at < begin || at >= end) s[n / 2][i * 2 + n % 2] = minus_infinity();
      }
    }
  }
#pragma unroll
  for (unsigned n = 0; n < N; n++)
#pragma unroll
    for (unsigned i = 0; i < 4; i++) top[i / 2] = fmaxf(top[i / 2], s[n][i]);
#pragma unroll
  for (unsigned i = 0; i < 2; i++) {
    top[i] = fmaxf(top[i], __shfl_xor_sync(FULL_WARP, top[i], 1));
    top[i] = fmaxf(top[i], __shfl_xor_sync(FULL_WARP, top[i], 2));
  }
}

// The maximum while tiles are added: `base` is what weights are relative to, `decay` what multiplies the state so far.
struct Running {
  float top[2], base[2], decay[2];
  __device__ __forceinline__ void reset() { resume(minus_infinity(), minus_infinity()); }
  __device__ __forceinline__ void resume(float low, float high) { top[0] = low, top[1] = high; }
  __device__ __forceinline__ void raise(const float (&by)[2]) {
#pragma unroll
    for (unsigned i = 0; i < 2; i++) {
      const float old = top[i];
      top[i] = fmaxf(old, by[i]);
      base[i] = top[i] == minus_infinity() ? 0.f : top[i];
      decay[i] = exp2_approx(__fadd_rn(old, -base[i]));
    }
  }
};

// Weights of 16 keys as the first operand of mma, and the sums of this lane's.
template <class T>
__device__ __forceinline__ void weigh(unsigned (&p)[4], float (&quarter)[2], const float (&left)[4], const float (&right)[4],
                                      const Running& running) {
#pragma unroll
  for (unsigned i = 0; i < 2; i++) {
    const float a = exp2_approx(__fadd_rn(left[2 * i], -running.base[i]));
    const float b = exp2_approx(__fadd_rn(left[2 * i + 1], -running.base[i]));
    const float c = exp2_approx(__fadd_rn(right[2 * i], -running.base[i]));
    const float d = exp2_approx(__fadd_rn(right[2 * i + 1], -running.base[i]));
    p[i] = pack2<T>(a, b);
    p[i + 2] = pack2<T>(c, d);
    quarter[i] = __fadd_rn(__fadd_rn(a, b), __fadd_rn(c, d));
  }
}

// Sum over the four lanes of a row.
__device__ __forceinline__ float quad_sum(float x) {
  x = __fadd_rn(x, __shfl_xor_sync(FULL_WARP, x, 1));
  return __fadd_rn(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

// The state of a row over several splits. Starting with the first split is the same as adding it to nothing.
struct Merge {
  float top, sum, old_scale, new_scale;
  __device__ __forceinline__ void reset() {
    top = minus_infinity();
    sum = 0.f;
  }
  __device__ __forceinline__ void add(float split_top, float split_sum) {
    const float next = fmaxf(top, split_top), base = next == minus_infinity() ? 0.f : next;
    old_scale = exp2_approx(__fadd_rn(top, -base));
    new_scale = exp2_approx(__fadd_rn(split_top, -base));
    top = next;
    sum = value(sum, split_sum);
  }
  __device__ __forceinline__ float value(float merged, float of_split) const {
    return __fmaf_rn(merged, old_scale, __fmul_rn(of_split, new_scale));
  }
};

// From the sum of the weights to what multiplies the sum of the values; a row that sees nothing gets zeros.
__device__ __forceinline__ float inverse(float sum) { return sum == 0.f ? 0.f : __fdividef(1.f, sum); }

// Adding zero makes both zeros one: the state of a row that skips a tile may differ in the sign of a zero.
__device__ __forceinline__ float attended(float value, float inverse_sum) { return __fmaf_rn(value, inverse_sum, 0.f); }

// Where one pair's head of queries or outputs lies in rows of `ld` elements.
struct PairPlace {
  size_t at;
  bool last;  // the last head of its row, behind which the row is padded
  __device__ __forceinline__ PairPlace(const Item& item, unsigned pair, unsigned kv_head, unsigned kv_heads, unsigned group,
                                       unsigned head_dim, unsigned ld) {
    const unsigned head = kv_head * group + pair % group;
    at = size_t(item.first_row + pair / group) * ld + head * head_dim;
    last = head + 1 == kv_heads * group;
  }
};

// Zeros from the last head of a row to its end, by the threads `index`, `index + stride`, ...
template <class T>
__device__ __forceinline__ void pad_row(T* last_head, unsigned width, unsigned head_dim, unsigned ld, unsigned index,
                                        unsigned stride) {
  for (unsigned col = width + index; col < ld; col += stride) last_head[head_dim + col - width] = from_float<T>(0.f);
}
