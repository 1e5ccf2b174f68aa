// What every kernel starts from: element types, warp sums, tensor-core instructions, asynchronous copies.
//
// The same files compile as host C++ for the tests (emulation/shim/emulation.h); what differs is in this file alone.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#define DYN_SMEM(T, name)                                              \
  extern __shared__ __align__(1024) unsigned char moetrail_dyn_smem[]; \
  T* name = reinterpret_cast<T*>(moetrail_dyn_smem)
#define EXPORT_KERNEL(name)
#else
#include "emulation.h"
#endif

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr unsigned NO_ROW = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half(x); }

// Two neighbouring elements in a register, the first in the low half.
template <class T>
__device__ __forceinline__ unsigned pack2(float first, float second);
template <>
__device__ __forceinline__ unsigned pack2<bf16>(float first, float second) {
  return __bfloat16_as_ushort(__float2bfloat16(first)) | unsigned(__bfloat16_as_ushort(__float2bfloat16(second))) << 16;
}
template <>
__device__ __forceinline__ unsigned pack2<f16>(float first, float second) {
  return __half_as_ushort(__float2half(first)) | unsigned(__half_as_ushort(__float2half(second))) << 16;
}

// The order of a warp's sum is that of a butterfly: the same on every lane.
__device__ __forceinline__ float warp_sum(float x) {
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(FULL_WARP, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
  return x;
}

// Sum over a block of whole warps, the same on every thread; `part` has room for 32 floats of shared memory.
__device__ __forceinline__ float block_sum(float x, float* part) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  const unsigned warps = blockDim.x / 32;
  x = warp_sum(threadIdx.x % 32 < warps ? part[threadIdx.x % 32] : 0.f);
  __syncthreads();
  return x;
}

__host__ __device__ __forceinline__ unsigned ceil_div(unsigned a, unsigned b) { return (a + b - 1) / b; }

// Packed weights: 16 outputs by 16 inputs lie together, 8 elements a lane, as `mma.m16n8k16` wants its first operand:
// lane 4 g + q holds rows g and g + 8, columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9. `cols16` is the padded width / 16.
__host__ __device__ __forceinline__ size_t packed_index(unsigned row, unsigned col, unsigned cols16) {
  const unsigned lane = row % 8 * 4 + col % 8 / 2;
  const unsigned reg = row % 16 / 8 + col % 16 / 8 * 2;
  return (size_t(row / 16) * cols16 + col / 16) * 256 + lane * 8 + reg * 2 + col % 2;
}

// d += a b: a is 16 x 16 (as packed above), b is 16 x 8 (lane 4 g + q holds column g, rows 2 q, 2 q + 1 and 2 q + 8,
// 2 q + 9), d is 16 x 8 (lane 4 g + q holds rows g and g + 8, columns 2 q and 2 q + 1).
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

#ifdef __CUDACC__
template <>
__device__ __forceinline__ void mma<bf16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<f16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i names row i % 8 of matrix i / 8; lane 4 g + q gets
// elements 2 q and 2 q + 1 of row g of each (transposed: rows 2 q and 2 q + 1 of column g).
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(unsigned(__cvta_generic_to_shared(row))));
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(unsigned(__cvta_generic_to_shared(row))));
}

// 16 bytes from global to shared memory; zeros where `valid` is false.
__device__ __forceinline__ void cp_async16(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(unsigned(__cvta_generic_to_shared(to))), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

// 16 bytes that are read once: they do not stay in the first-level cache.
__device__ __forceinline__ uint4 load_stream(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// A load that happens where it stands: the compiler would move it to its first use.
__device__ __forceinline__ unsigned load_now(const unsigned* from) {
  unsigned v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}
#endif

#ifndef __CUDACC__
template <>
inline void mma<bf16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { emu_mma<bf16>(d, a, b); }
template <>
inline void mma<f16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { emu_mma<f16>(d, a, b); }
#endif
