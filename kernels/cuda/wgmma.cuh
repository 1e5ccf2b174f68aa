// Products by Hopper's warpgroup instructions, which only machine code for 9.0a has: elsewhere these kernels trap.
//
// 128 threads multiply 64 outputs by N tokens. The weights come from registers, 16 outputs a warp, just as `mma` has
// them; the tokens from shared memory, where the hardware finds them by a descriptor. An instruction runs while its
// threads go on: until the wait, its registers and what it reads in shared memory must be left alone.
#pragma once
#include <type_traits>

#include "gemm.cuh"

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA 1
#endif

// A chunk is two instructions deep; a row of a stage is two chunks, which is how far the hardware permutes at once.
constexpr unsigned WIDE_BYTES = 2 * ROW_BYTES;

// Where 16 bytes of a row of tokens lie in a stage: the 128-byte swizzle, of a stage at a multiple of 1024 bytes.
__device__ __forceinline__ unsigned swizzled(unsigned row, unsigned piece) {
  return row * WIDE_BYTES + (piece ^ row % 8) * 16;
}

// Tokens whose K lies together: 8 rows take 1024 bytes (the stride between groups of rows, in units of 16), permuted
// within 128 bytes (1 in the upper two bits). The other stride, between pieces of K, does not count then. `address` is
// in shared memory; 32 bytes further are the next 16 of K.
constexpr unsigned DESCRIPTOR_HIGH = 1u << 30 | 8 * WIDE_BYTES / 16;
__device__ __forceinline__ uint64_t token_descriptor(unsigned address) {
  return uint64_t(DESCRIPTOR_HIGH) << 32 | 1u << 16 | (address & 0x3ffff) / 16;
}

#ifndef __CUDACC__
// emulation.h has: wgmma, wgmma_fence, wgmma_commit, wgmma_wait, fence_async, shared_address, settle.
#elif defined(HAS_WGMMA)
__device__ __forceinline__ unsigned shared_address(const void* at) { return unsigned(__cvta_generic_to_shared(at)); }

// What this thread wrote to shared memory is seen by the tensor cores, once whoever asks them knows of this.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers as they are now are what the next instructions read and add to.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// At most N groups are still under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }

// The compiler knows nothing of an instruction that runs on: it may not move uses of `d` across this.
template <unsigned COUNT>
__device__ __forceinline__ void settle(float (&d)[COUNT]) {
#pragma unroll
  for (unsigned i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}

// d = a b, or d += a b: a is 64 x 16, warp w has rows 16 w.. as `mma` would; b is 16 x 2 COUNT, in shared memory; d is
// 64 x 2 COUNT: d[4 j..] is what `mma` would have of columns 8 j...
template <class T, unsigned COUNT>
__device__ __forceinline__ void wgmma(float (&d)[COUNT], const unsigned (&a)[4], uint64_t b, bool add);

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define WGMMA(T, type, count, n, d_list, a_list, b_name, add_name, ...)                                                \
  template <>                                                                                                          \
  __device__ __forceinline__ void wgmma<T, count>(float (&d)[count], const unsigned (&a)[4], uint64_t b, bool add) {   \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_name ", 0;\nwgmma.mma_async.sync.aligned.m64n" n          \
                 "k16.f32." type "." type " {" d_list "}, {" a_list "}, " b_name ", add, 1, 1, 0;\n}"                  \
                 : __VA_ARGS__                                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(unsigned(add)));                            \
  }
#define LIST32                                                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24," \
  " %25, %26, %27, %28, %29, %30, %31"
#define LIST40 LIST32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FOR_TYPE(T, type)                                                                                              \
  WGMMA(T, type, 32, "64", LIST32, "%32, %33, %34, %35", "%36", "%37", D8(0), D8(8), D8(16), D8(24))                   \
  WGMMA(T, type, 40, "80", LIST40, "%40, %41, %42, %43", "%44", "%45", D8(0), D8(8), D8(16), D8(24), D8(32))
FOR_TYPE(bf16, "bf16")
FOR_TYPE(f16, "f16")
#undef FOR_TYPE
#undef LIST40
#undef LIST32
#undef WGMMA
#undef D8
#undef D4
#endif

// Two warpgroups take 4 panels each, of the same tokens: H times N of them.
template <unsigned N, unsigned H>
constexpr unsigned WGMMA_STAGE = (8 * 16 + H * N) * WIDE_BYTES;

// As many as fit 160 KiB; or half of that, where registers leave room for two blocks.
template <unsigned N, unsigned H>
constexpr unsigned WGMMA_STAGES = (H == 1 ? 96 : 160) * 1024 / WGMMA_STAGE<N, H>;

// Tokens rows(0..H * N) by 8 panels from `first_panel`. The tokens are H parts with accumulators of their own: while
// one part's segment is added to its total, the tensor cores have another part's products to go on with.
template <class T, unsigned N, unsigned H, class Rows, class Out>
__device__ __forceinline__ void wgmma_product(unsigned char* smem, const Weights& w, const Tokens& x,
                                              unsigned first_panel, const Rows& rows, const Out& out) {
#ifdef HAS_WGMMA
  constexpr unsigned STAGE = WGMMA_STAGE<N, H>, STAGES = WGMMA_STAGES<N, H>, THREADS = 256;
  constexpr unsigned A = 8 * 16 * 8 / THREADS, B = H * N * 8 / THREADS, NT = N / 8, TOKENS = 8 * 16 * WIDE_BYTES;
  static_assert(H * N * 8 % THREADS == 0 && STAGE % 1024 == 0 && STAGES >= 3, "");
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (shared_address(smem) % 1024 != 0) __trap();  // the hardware permutes by address

  // Rows as multiples of 16 bytes: registers are what limits a tile.
  unsigned row[B];
#pragma unroll
  for (unsigned i = 0; i < B; i++) {
    const unsigned token = rows(i, threadIdx.x / 8 + i * 32);
    row[i] = token != NO_ROW ? unsigned(size_t(token) * x.row_bytes / 16) : NO_ROW;
  }
  const unsigned own_panel = first_panel + threadIdx.x / 128;
  // Two chunks. If there is but one, zeros stand for the other. What is absent is not read, but still needs an address.
  const unsigned stages = ceil_div(w.chunks, 2);
  auto load = [&](unsigned char* stage, unsigned index) {
    const bool has_weights = 2 * index + threadIdx.x / 64 % 2 < w.chunks;
    const bool has_tokens = 2 * index + threadIdx.x / 4 % 2 < w.chunks;
    const unsigned char* panel = w.panel(own_panel) + size_t(index) * (2 * PANEL_BYTES) + threadIdx.x % 128 * 16;
#pragma unroll
    for (unsigned i = 0; i < A; i++) {
      const bool has = has_weights && own_panel + 2 * i < w.panels;
      cp_async16(stage + threadIdx.x * 16 + i * (THREADS * 16), has ? panel : w.first, has);
      panel += size_t(w.chunks) * (2 * PANEL_BYTES);
    }
#pragma unroll
    for (unsigned i = 0; i < B; i++) {
      const bool has = has_tokens && row[i] != NO_ROW;
      const unsigned char* from = x.first + size_t(row[i]) * 16 + index * WIDE_BYTES + threadIdx.x % 8 * 16;
      cp_async16(stage + TOKENS + swizzled(threadIdx.x / 8 + i * 32, threadIdx.x % 8), has ? from : x.first, has);
    }
  };

  for (unsigned i = 0; i + 1 < STAGES; i++) {
    if (i < stages) load(smem + i * STAGE, i);
    cp_async_commit();
  }
  out.prepare();

  float acc[H][4 * NT] = {}, total[H][4 * NT] = {};
  unsigned even[2][4], odd[2][4];  // a chunk's weights
  unsigned char* stage = smem;
  auto fetch = [&](unsigned(&weights)[2][4], unsigned which) {
#pragma unroll
    for (unsigned step = 0; step < 2; step++) {
      const unsigned char* from = stage + warp * (2 * PANEL_BYTES) + which * PANEL_BYTES + step * 512 + lane * 16;
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      weights[step][0] = v.x;
      weights[step][1] = v.y;
      weights[step][2] = v.z;
      weights[step][3] = v.w;
    }
  };
  // One chunk of a stage; where a segment begins, the sums of the segment before it go to the total.
  auto multiply = [&](const unsigned(&weights)[2][4], unsigned which, auto begins) {
    constexpr bool BEGINS = decltype(begins)::value;
    const uint64_t tokens = token_descriptor(shared_address(stage) + TOKENS + which * ROW_BYTES);
#pragma unroll
    for (unsigned h = 0; h < H; h++) {
      if constexpr (BEGINS) {
        // Nothing of this part is under way then; the tensor cores go on with the other.
        wgmma_wait<H - 1>();
        settle(acc[h]);
#pragma unroll
        for (unsigned i = 0; i < 4 * NT; i++) total[h][i] += acc[h][i];
        settle(acc[h]);
      }
      wgmma_fence();
      wgmma<T>(acc[h], weights[0], tokens + h * (N * WIDE_BYTES / 16), !BEGINS);
      wgmma<T>(acc[h], weights[1], tokens + h * (N * WIDE_BYTES / 16) + 2, true);
      wgmma_commit();
    }
  };

  cp_async_wait<STAGES - 2>();
  fence_async();
  __syncthreads();  // the first stage is there
  fetch(even, 0);
  multiply(even, 0, std::true_type());
  auto second = [&]() {
    wgmma_wait<H>();  // all of the stage before has been multiplied: `odd` and that stage are free
    fetch(odd, 1);
    multiply(odd, 1, std::false_type());
  };
  // To the first chunk of the next stage, stage `index`.
  auto next = [&](unsigned index, auto begins) {
    cp_async_wait<STAGES - 3>();
    fence_async();
    // Each thread waited for its own copies of the next stage: behind the barrier all threads' are there. And both
    // warpgroups have done with the stage before, which is the next to be filled.
    __syncthreads();
    unsigned char* filled = stage == smem ? smem + (STAGES - 1) * STAGE : stage - STAGE;
    stage = stage == smem + (STAGES - 1) * STAGE ? smem : stage + STAGE;
    wgmma_wait<H>();  // `even` is free
    fetch(even, 0);
    multiply(even, 0, begins);
    // Behind what the tensor cores wait for.
    if (index + STAGES - 2 < stages) load(filled, index + STAGES - 2);
    cp_async_commit();
  };
  // Sums may be read while others are under way only where the compiler sees in one stretch of code what was issued
  // since: so a segment's last chunk stands before the first of the next. Else it would serialise all (C7514).
  for (unsigned i = 1;; i++) {
    const unsigned end = umin(i - 1 + w.segment / 2, stages);  // segments are of an even number of chunks
    for (; i < end; i++) {
      second();
      next(i, std::false_type());
    }
    if (i == stages) break;
    second();
    next(i, std::true_type());
  }
  second();
  wgmma_wait<0>();
#pragma unroll
  for (unsigned h = 0; h < H; h++) {
    settle(acc[h]);
#pragma unroll
    for (unsigned i = 0; i < 4 * NT; i++) total[h][i] += acc[h][i];
  }
  cp_async_wait<0>();

  if constexpr (Out::PANELS == 1) {
#pragma unroll
    for (unsigned h = 0; h < H; h++)
#pragma unroll
      for (unsigned j = 0; j < NT; j++) {
        const float sums[1][4] = {{total[h][4 * j], total[h][4 * j + 1], total[h][4 * j + 2], total[h][4 * j + 3]}};
        out.put(first_panel + warp, h * NT + j, sums);
      }
  } else {
    // Neighbouring warps have the panels that belong together: each finishes half of the tokens for both, and gives the
    // other half away, where the stages were.
    static_assert(Out::PANELS == 2 && H * NT % 2 == 0 && 8 * H * NT / 2 * 512 <= STAGES * STAGE, "");
    constexpr unsigned HALF = H * NT / 2;
    float4* mine = reinterpret_cast<float4*>(smem) + warp * (HALF * 32) + lane;
    const float4* theirs = reinterpret_cast<const float4*>(smem) + (warp ^ 1) * (HALF * 32) + lane;
    auto sums_of = [&](unsigned tile) -> const float* { return &total[tile / NT][tile % NT * 4]; };
    auto give = [&](unsigned first) {
#pragma unroll
      for (unsigned j = 0; j < HALF; j++) {
        const float* sums = sums_of(first + j);
        mine[j * 32] = make_float4(sums[0], sums[1], sums[2], sums[3]);
      }
    };
    __syncthreads();  // all have done with the stages
    if (warp % 2 == 0) give(HALF);
    else give(0);
    __syncthreads();
    if (warp % 2 == 0) {
#pragma unroll
      for (unsigned j = 0; j < HALF; j++) {
        const float* own = sums_of(j);
        const float4 other = theirs[j * 32];
        const float sums[2][4] = {{own[0], own[1], own[2], own[3]}, {other.x, other.y, other.z, other.w}};
        out.put((first_panel + warp) / 2, j, sums);
      }
    } else {
#pragma unroll
      for (unsigned j = 0; j < HALF; j++) {
        const float* own = sums_of(HALF + j);
        const float4 other = theirs[j * 32];
        const float sums[2][4] = {{other.x, other.y, other.z, other.w}, {own[0], own[1], own[2], own[3]}};
        out.put((first_panel + warp) / 2, HALF + j, sums);
      }
    }
  }
#elif defined(__CUDA_ARCH__)
  __trap();
#endif
}
