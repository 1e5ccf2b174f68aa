// Host stand-in for the part of CUDA C++ that the kernels use. Every CUDA thread of a block is a fiber, blocks run one
// after another; barriers and exchanges within a warp switch fibers. What it cannot show: races between warps,
// coalescing, speed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __constant__ static const
#define __align__(n) alignas(n)

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline int __float_as_int(float f) { int u; memcpy(&u, &f, 4); return u; }
static inline float __int_as_float(int u) { float f; memcpy(&f, &u, 4); return f; }

struct __nv_bfloat16 { uint16_t bits; };
static inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
static inline __nv_bfloat16 __float2bfloat16(float f) {
  const uint32_t u = __float_as_uint(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fff)};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return {v}; }

struct __half { uint16_t bits; };
static inline float __half2float(__half v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, exponent = (v.bits >> 10) & 31u, fraction = v.bits & 1023u;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return __uint_as_float(sign | __float_as_uint(float(fraction) * 0x1p-24f));
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
static inline __half __float2half(float f) {
  const uint32_t u = __float_as_uint(f), sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return {uint16_t(0x7fff)};
  if (mag >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
  if (mag < 0x38800000u) return {uint16_t(sign | uint32_t(std::nearbyintf(__uint_as_float(mag) * 0x1p24f)))};
  const uint32_t rounded = mag + 0xfffu + ((mag >> 13) & 1);
  return {uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
}
static inline unsigned short __half_as_ushort(__half v) { return v.bits; }
static inline __half __ushort_as_half(unsigned short v) { return {v}; }

static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
#define __expf(x) expf(x)  // glibc declares names of its own
#define __logf(x) logf(x)
static inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline unsigned umin(unsigned a, unsigned b) { return a < b ? a : b; }
static inline unsigned umax(unsigned a, unsigned b) { return a > b ? a : b; }
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }
template <class T> static inline T __ldg(const T* p) { return *p; }

namespace emu {

enum State { READY, AT_BLOCK, AT_WARP, DONE };

struct Copy { void* to; const void* from; bool valid; };

// An instruction of a warpgroup that is under way: its registers are those of the thread, and are read and written when
// it is waited for.
struct Product {
  void (*run)(const Product&);
  float* d;
  const unsigned* a;
  uint64_t b;
  bool add;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool begun;
  State state;
  uint3 tid;
  unsigned turn;  // which half of its slots the next exchange uses
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  bool unfenced;  // has copied, and not told the tensor cores
  bool arrived;   // its registers are ready for products
  std::vector<Product> open_products;
  std::vector<std::vector<Product>> product_groups;
};

constexpr size_t STACK = 128 << 10;

struct alignas(16) Slot { unsigned char bytes[64]; };

struct Block {
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  std::vector<Fiber> fibers;
  unsigned char* stacks;
  std::vector<Slot> slots[2];
  size_t current;
  void (*call)(void**);
  void** args;
  std::vector<unsigned char> smem;
  bool unfenced;  // a barrier was passed with copies that the tensor cores do not see
};

inline thread_local Block* block = nullptr;
inline thread_local uint3 tid, bid;
inline thread_local dim3 bdim, gdim;

[[noreturn]] inline void die(const char* message) {
  fprintf(stderr, "emulation: %s (block %u,%u,%u thread %u)\n", message, bid.x, bid.y, bid.z, tid.x);
  abort();
}

// The compiler may not keep addresses of thread-local variables across a switch; there is one thread.
__attribute__((noinline)) inline void park(State state) {
  Block* b = block;
  Fiber& fiber = b->fibers[b->current];
  fiber.state = state;
  if (_setjmp(fiber.at) == 0) _longjmp(b->scheduler, 1);
}

inline void entry() {
  Block* b = block;
  b->call(b->args);
  b = block;
  Fiber& fiber = b->fibers[b->current];
  if (!fiber.open.empty() || !fiber.groups.empty()) die("a thread ends with asynchronous copies that it never waited for");
  if (!fiber.open_products.empty() || !fiber.product_groups.empty())
    die("a thread ends with products that it never waited for");
  fiber.state = DONE;
  _longjmp(b->scheduler, 1);
}

__attribute__((noinline)) inline void resume(Block* b, size_t index) {
  b->current = index;
  Fiber& fiber = b->fibers[index];
  tid = fiber.tid;
  if (_setjmp(b->scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}

inline void run(void (*call)(void**), dim3 grid, dim3 threads, size_t smem, void** args) {
  Block b;
  const size_t n = size_t(threads.x) * threads.y * threads.z;
  b.fibers.resize(n);
  // Kept from launch to launch: fresh pages cost more than most kernels.
  static thread_local std::vector<unsigned char> stacks;
  if (stacks.size() < n * STACK) stacks.resize(n * STACK);
  b.stacks = stacks.data();
  b.slots[0].resize(n);
  b.slots[1].resize(n);
  b.call = call;
  b.args = args;
  block = &b;
  bdim = threads;
  gdim = grid;
  for (size_t i = 0; i < n; i++) getcontext(&b.fibers[i].start);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        bid = {x, y, z};
        b.smem.assign(smem + 1024, 0xFF);  // shared memory starts as rubbish, as on the chip
        b.unfenced = false;
        for (size_t i = 0; i < n; i++) {
          Fiber& fiber = b.fibers[i];
          fiber.start.uc_stack.ss_sp = b.stacks + i * STACK;
          fiber.start.uc_stack.ss_size = STACK;
          fiber.start.uc_link = nullptr;
          makecontext(&fiber.start, entry, 0);
          fiber.begun = false;
          fiber.state = READY;
          fiber.turn = 0;
          fiber.open.clear();
          fiber.groups.clear();
          fiber.unfenced = fiber.arrived = false;
          fiber.open_products.clear();
          fiber.product_groups.clear();
          fiber.tid = {unsigned(i % threads.x), unsigned(i / threads.x % threads.y), unsigned(i / threads.x / threads.y)};
        }
        for (;;) {
          size_t done = 0, at_block = 0;
          bool ran = false;
          // A warp runs until it waits for the block.
          for (size_t warp = 0; warp < n; warp += 32) {
            const size_t end = std::min(warp + 32, n);
            for (;;) {
              size_t live = 0, at = 0;
              for (size_t i = warp; i < end; i++)
                if (b.fibers[i].state == READY) {
                  ran = true;
                  resume(&b, i);
                }
              for (size_t i = warp; i < end; i++) {
                live += b.fibers[i].state != DONE;
                at += b.fibers[i].state == AT_WARP;
              }
              if (at == 0) break;
              if (at != live) {
                die("lanes of one warp wait in different places");
              }
              for (size_t i = warp; i < end; i++)
                if (b.fibers[i].state == AT_WARP) b.fibers[i].state = READY;
            }
          }
          for (auto& fiber : b.fibers) {
            done += fiber.state == DONE;
            at_block += fiber.state == AT_BLOCK;
          }
          if (done == n) break;
          if (at_block + done != n || !ran) die("threads of one block wait at different barriers");
          for (auto& fiber : b.fibers)
            if (fiber.state == AT_BLOCK) fiber.state = READY;
        }
      }
  block = nullptr;
}

// All live lanes of the warp post a value, then each sees those of the others: `slot(lane)`.
struct Posted {
  const std::vector<Slot>& slots;
  size_t warp;
  template <class T> T of(unsigned lane) const {
    T value;
    memcpy(&value, slots[warp + lane].bytes, sizeof(T));
    return value;
  }
};
template <class T> inline Posted post(const T& value) {
  static_assert(sizeof(T) <= sizeof(Slot), "");
  Block* b = block;
  const size_t index = b->current;
  const unsigned turn = b->fibers[index].turn++ % 2;
  memcpy(b->slots[turn][index].bytes, &value, sizeof(T));
  park(AT_WARP);
  return {block->slots[turn], index / 32 * 32};
}
template <class T> inline T exchange(T value, unsigned lane) { return post(value).template of<T>(lane & 31); }
inline unsigned lane() { return unsigned(block->current % 32); }

using Call = void (*)(void**);
struct Kernel {
  Call call;
  std::vector<size_t> parameters;  // bytes of each
};
inline std::map<std::string, Kernel>& table() {
  static std::map<std::string, Kernel> kernels;
  return kernels;
}
template <class... A> std::vector<size_t> parameters(void (*)(A...)) { return {sizeof(A)...}; }
template <auto K> struct Wrap;
template <class... A, void (*K)(A...)> struct Wrap<K> {
  template <size_t... I> static void go(void** a, std::index_sequence<I...>) {
    K(*reinterpret_cast<std::remove_const_t<A>*>(a[I])...);
  }
  static void call(void** a) { go(a, std::index_sequence_for<A...>{}); }
};
struct Register {
  Register(const char* name, Call call, std::vector<size_t> parameters) { table()[name] = {call, std::move(parameters)}; }
};

}  // namespace emu

#define threadIdx (emu::tid)
#define blockIdx (emu::bid)
#define blockDim (emu::bdim)
#define gridDim (emu::gdim)
#define warpSize 32
static inline void __syncthreads() {
  if (emu::block->fibers[emu::block->current].unfenced) emu::block->unfenced = true;
  emu::park(emu::AT_BLOCK);
}
static inline void __trap() { emu::die("trap"); }
static inline void __syncwarp(unsigned = ~0u) { emu::park(emu::AT_WARP); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
template <class T> static inline T __shfl_xor_sync(unsigned, T v, int m) { return emu::exchange(v, emu::lane() ^ unsigned(m)); }
template <class T> static inline T __shfl_sync(unsigned, T v, int s) { return emu::exchange(v, unsigned(s)); }
template <class T> static inline T __shfl_down_sync(unsigned, T v, unsigned d) {
  const unsigned lane = emu::lane();
  return emu::exchange(v, lane + d < 32 ? lane + d : lane);
}
template <class T> static inline T __shfl_up_sync(unsigned, T v, unsigned d) {
  const unsigned lane = emu::lane();
  return emu::exchange(v, lane >= d ? lane - d : lane);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto posted = emu::post<int>(predicate);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) bits |= unsigned(posted.of<int>(lane) != 0) << lane;
  return bits;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
static inline unsigned __match_any_sync(unsigned mask, unsigned value) {
  const auto posted = emu::post(value);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) bits |= unsigned(posted.of<unsigned>(lane) == value) << lane;
  return bits;
}
template <class F> static inline unsigned emu_reduce(unsigned value, F&& combine) {
  const auto posted = emu::post(value);
  unsigned all = posted.of<unsigned>(0);
  for (unsigned lane = 1; lane < 32; lane++) all = combine(all, posted.of<unsigned>(lane));
  return all;
}
static inline unsigned __reduce_max_sync(unsigned, unsigned v) { return emu_reduce(v, umax); }
static inline unsigned __reduce_min_sync(unsigned, unsigned v) { return emu_reduce(v, umin); }
static inline unsigned __reduce_add_sync(unsigned, unsigned v) {
  return emu_reduce(v, [](unsigned a, unsigned b) { return a + b; });
}
template <class T> static inline T emu_atomic(T* p, T next) { T old = *p; *p = next; return old; }
static inline int atomicAdd(int* p, int v) { return emu_atomic(p, *p + v); }
static inline unsigned atomicAdd(unsigned* p, unsigned v) { return emu_atomic(p, *p + v); }
static inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) { return emu_atomic(p, *p + v); }
static inline float atomicAdd(float* p, float v) { return emu_atomic(p, *p + v); }
static inline unsigned atomicOr(unsigned* p, unsigned v) { return emu_atomic(p, *p | v); }
static inline unsigned atomicMax(unsigned* p, unsigned v) { return emu_atomic(p, std::max(*p, v)); }
static inline int atomicMax(int* p, int v) { return emu_atomic(p, std::max(*p, v)); }
static inline unsigned atomicMin(unsigned* p, unsigned v) { return emu_atomic(p, std::min(*p, v)); }

#define DYN_SMEM(T, name) T* name = (T*)((uintptr_t(emu::block->smem.data()) + 1023) & ~uintptr_t(1023))
#define EXPORT_KERNEL(name) \
  static emu::Register emu_register_##name(#name, &emu::Wrap<name>::call, emu::parameters(name));

// Tensor-core instructions and asynchronous copies, as `common.cuh` says.
using bf16 = __nv_bfloat16;
using f16 = __half;
static inline float emu_half_of(bf16, unsigned reg, unsigned which) { return __bfloat162float({uint16_t(reg >> 16 * which)}); }
static inline float emu_half_of(f16, unsigned reg, unsigned which) { return __half2float({uint16_t(reg >> 16 * which)}); }
struct EmuFragments { unsigned a[4], b[2]; };
template <class T> static inline void emu_mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  EmuFragments own;
  memcpy(own.a, a, sizeof own.a);
  memcpy(own.b, b, sizeof own.b);
  const auto posted = emu::post(own);
  const unsigned g = emu::lane() / 4, q = emu::lane() % 4;
  for (unsigned i = 0; i < 4; i++) {
    const unsigned row = g + i / 2 * 8, col = 2 * q + i % 2;
    float sum = 0;
    for (unsigned k = 0; k < 16; k++) {
      const auto left = posted.of<EmuFragments>(row % 8 * 4 + k % 8 / 2);
      const auto right = posted.of<EmuFragments>(col * 4 + k % 8 / 2);
      sum += emu_half_of(T{}, left.a[row / 8 + k / 8 * 2], k % 2) * emu_half_of(T{}, right.b[k / 8], k % 2);
    }
    d[i] += sum;
  }
}
static inline void emu_ldmatrix(unsigned (&r)[4], const void* row, bool transposed) {
  if (uintptr_t(row) % 16 != 0) emu::die("ldmatrix: a row is not at a multiple of 16 bytes");
  const auto posted = emu::post(row);
  const unsigned g = emu::lane() / 4, q = emu::lane() % 4;
  for (unsigned i = 0; i < 4; i++) {
    uint16_t pair[2];
    for (unsigned j = 0; j < 2; j++) {
      const unsigned from = transposed ? 2 * q + j : g, at = transposed ? g : 2 * q + j;
      pair[j] = static_cast<const uint16_t*>(posted.of<const void*>(i * 8 + from))[at];
    }
    r[i] = pair[0] | unsigned(pair[1]) << 16;
  }
}
static inline void ldmatrix_x4(unsigned (&r)[4], const void* row) { emu_ldmatrix(r, row, false); }
static inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) { emu_ldmatrix(r, row, true); }
// Copies happen as late as they may, so that a wait too few is seen.
static inline void cp_async16(void* to, const void* from, bool valid = true) {
  if (uintptr_t(to) % 16 != 0 || (valid && uintptr_t(from) % 16 != 0)) emu::die("cp.async: not at a multiple of 16 bytes");
  emu::block->fibers[emu::block->current].open.push_back({to, from, valid});
}
static inline void cp_async_commit() {
  emu::Fiber& fiber = emu::block->fibers[emu::block->current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int N> static inline void cp_async_wait() {
  emu::Fiber& fiber = emu::block->fibers[emu::block->current];
  while (fiber.groups.size() > N) {
    fiber.unfenced |= !fiber.groups.front().empty();
    for (const emu::Copy& copy : fiber.groups.front()) {
      if (copy.valid) memcpy(copy.to, copy.from, 16);
      else memset(copy.to, 0, 16);
    }
    fiber.groups.erase(fiber.groups.begin());
  }
}
static inline uint4 load_stream(const void* from) {
  if (uintptr_t(from) % 16 != 0) emu::die("load_stream: not at a multiple of 16 bytes");
  uint4 v;
  memcpy(&v, from, 16);
  return v;
}
static inline unsigned load_now(const unsigned* from) { return *from; }

// Instructions of warpgroups, as `wgmma.cuh` says. They happen as late as they may, so that a wait too few is seen.
static inline unsigned char* emu_shared_base() {
  return (unsigned char*)((uintptr_t(emu::block->smem.data()) + 1023) & ~uintptr_t(1023));
}
// Dynamic shared memory does not begin at address 0.
constexpr unsigned EMU_SHARED_FIRST = 1024;
static inline unsigned shared_address(const void* at) {
  return unsigned(static_cast<const unsigned char*>(at) - emu_shared_base()) + EMU_SHARED_FIRST;
}
// 16 bytes of a K-major operand: 8 elements of a row, from element `piece` * 8 on. A descriptor has, in units of 16
// bytes, where it starts (14 bits), from bit 16 on the stride between pieces (which counts without a swizzle alone), from
// bit 32 on the stride between groups of 8 rows, and from bit 62 on what is permuted: nothing, 128, 64 or 32 bytes.
static inline const uint16_t* emu_operand(uint64_t descriptor, unsigned row, unsigned piece) {
  const auto field = [&](unsigned bit) { return unsigned(descriptor >> bit & 0x3fff) * 16; };
  const unsigned mode = unsigned(descriptor >> 62), width = mode == 0 ? 16 : 256 >> mode;
  if ((descriptor >> 49 & 7) != 0) emu::die("wgmma: a base offset is not emulated");
  unsigned address = field(0) + row / 8 * field(32) + row % 8 * width + piece * (mode == 0 ? field(16) : 16);
  // Within 8 rows, pieces of 16 bytes are permuted by the address bits from 7 on: 3, 2 or 1 of them.
  address ^= (address >> 7 & (width / 16 - 1)) << 4;
  if (address < EMU_SHARED_FIRST || address - EMU_SHARED_FIRST + 1024 + 16 > emu::block->smem.size())
    emu::die("wgmma: an operand is not in shared memory");
  return reinterpret_cast<const uint16_t*>(emu_shared_base() + (address - EMU_SHARED_FIRST));
}
struct EmuWeights { unsigned a[4]; };
// Each warp has 16 of the 64 rows. The sum begins with what there was: it is rounded otherwise than that of `emu_mma`,
// so that whoever takes the two for equal is found out.
template <class T, unsigned COUNT> static inline void emu_wgmma_run(const emu::Product& product) {
  EmuWeights own;
  memcpy(own.a, product.a, sizeof own.a);
  const auto posted = emu::post(own);
  const unsigned g = emu::lane() / 4, q = emu::lane() % 4;
  float a[2][16];
  for (unsigned k = 0; k < 16; k++) {
    const auto left = posted.of<EmuWeights>(g * 4 + k % 8 / 2);
    for (unsigned h = 0; h < 2; h++) a[h][k] = emu_half_of(T{}, left.a[h + k / 8 * 2], k % 2);
  }
  for (unsigned j = 0; j < COUNT / 4; j++)
    for (unsigned c = 0; c < 2; c++) {
      float b[16];
      for (unsigned k = 0; k < 16; k++)
        b[k] = emu_half_of(T{}, emu_operand(product.b, j * 8 + 2 * q + c, k / 8)[k % 8], 0);
      for (unsigned h = 0; h < 2; h++) {
        float& d = product.d[j * 4 + h * 2 + c];
        float sum = product.add ? d : 0.f;
        for (unsigned k = 0; k < 16; k++) sum += a[h][k] * b[k];
        d = sum;
      }
    }
}
static inline void fence_async() { emu::block->fibers[emu::block->current].unfenced = false; }
static inline void wgmma_fence() { emu::block->fibers[emu::block->current].arrived = true; }
template <class T, unsigned COUNT>
static inline void wgmma(float (&d)[COUNT], const unsigned (&a)[4], uint64_t b, bool add) {
  emu::Fiber& fiber = emu::block->fibers[emu::block->current];
  if (!fiber.arrived) emu::die("wgmma without a fence of its registers");
  if (emu::block->unfenced) emu::die("wgmma: shared memory was written without a fence for the tensor cores");
  fiber.open_products.push_back({&emu_wgmma_run<T, COUNT>, d, a, b, add});
}
static inline void wgmma_commit() {
  emu::Fiber& fiber = emu::block->fibers[emu::block->current];
  fiber.product_groups.push_back(std::move(fiber.open_products));
  fiber.open_products.clear();
  fiber.arrived = false;
}
template <int N> static inline void wgmma_wait() {
  emu::Fiber& fiber = emu::block->fibers[emu::block->current];
  while (fiber.product_groups.size() > N) {
    for (const emu::Product& product : fiber.product_groups.front()) product.run(product);
    fiber.product_groups.erase(fiber.product_groups.begin());
  }
}
template <unsigned COUNT> static inline void settle(float (&)[COUNT]) {}
