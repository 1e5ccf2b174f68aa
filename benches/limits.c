// What this machine allows: read bandwidth and arithmetic peaks, as one JSON object.
//
//   cc -O3 -march=native -pthread limits.c -o limits && ./limits THREADS [MIB_PER_THREAD] [ROUNDS] [FIGURE]
//
// Every figure is the best of ROUNDS: a limit is what the machine can do, not what it does on average. A FIGURE
// (as f32_gflop_s) is measured alone.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
typedef float lanes __attribute__((vector_size(WIDTH)));
enum { LANES = WIDTH / sizeof(float), CHAINS = 12 };  // 12 sums hide the latency of two units and fit 16 registers

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static float total(const lanes *sums) {
  float sum = 0;
  for (int i = 0; i < CHAINS; i++)
    for (int j = 0; j < LANES; j++) sum += sums[i][j];
  return sum;
}

// Bytes read.
static double read_all(const lanes *memory, size_t bytes, volatile float *sink) {
  lanes sums[CHAINS] = {0};
  size_t steps = bytes / sizeof(lanes) / CHAINS;
  for (size_t i = 0; i < steps; i++)
#pragma GCC unroll 12
    for (int k = 0; k < CHAINS; k++) sums[k] += memory[i * CHAINS + k];
  *sink = total(sums);
  return (double)steps * CHAINS * sizeof(lanes);
}

// Operations of `sum = sum * x + y`; the compiler contracts it to a fused one where the processor has that.
static double f32_products(long steps, volatile float *sink) {
  lanes sums[CHAINS], x = {0}, y = {0};
  x += 1.0000001f;
  y += 1e-9f;
  for (int k = 0; k < CHAINS; k++) sums[k] = x + (float)k;
  for (long i = 0; i < steps; i++)
#pragma GCC unroll 12
    for (int k = 0; k < CHAINS; k++) sums[k] = sums[k] * x + y;
  *sink = total(sums);
  return 2.0 * steps * CHAINS * LANES;
}

#ifdef __AVX512BF16__
static double bf16_products(long steps, volatile float *sink) {
  __m512 sums[CHAINS];
  __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f80), y = (__m512bh)_mm512_set1_epi16(0x2f80);
  for (int k = 0; k < CHAINS; k++) sums[k] = _mm512_set1_ps(k);
  for (long i = 0; i < steps; i++)
#pragma GCC unroll 12
    for (int k = 0; k < CHAINS; k++) sums[k] = _mm512_dpbf16_ps(sums[k], x, y);
  float sum = 0;
  for (int k = 0; k < CHAINS; k++) sum += _mm512_reduce_add_ps(sums[k]);
  *sink = sum;
  return 4.0 * steps * CHAINS * 16;
}
#endif

#ifdef __AMX_BF16__
// Matrix tiles: 16 rows of 16 sums, 32 products each. The system grants them on request only.
static int tiles_granted(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18L) == 0; }

static double tile_products(long steps, volatile float *sink) {
  struct { uint8_t palette, start_row, reserved[14]; uint16_t column_bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
  float sums[256];
  uint16_t ones[512];
  for (int i = 0; i < 512; i++) ones[i] = 0x3f80;
  for (int i = 0; i < 8; i++) shape.column_bytes[i] = 64, shape.rows[i] = 16;
  _tile_loadconfig(&shape);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  for (long i = 0; i < steps; i++) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, sums, 64);
  _tile_release();
  *sink = sums[0];
  return 2.0 * steps * 4 * 16 * 16 * 32;
}
#endif

enum Kind { READ, F32, BF16, TILES, KINDS };
static const char *const names[KINDS] = {"read_gb_s", "f32_gflop_s", "bf16_dot_gflop_s", "bf16_tile_gflop_s"};
static enum Kind kind;
static size_t bytes_per_thread;
static pthread_barrier_t barrier;

struct Thread {
  pthread_t handle;
  lanes *memory;
  double work, began, ended;
  volatile float sink;
};

static int available(enum Kind k) {
#ifdef __AVX512BF16__
  if (k == BF16) return 1;
#endif
#ifdef __AMX_BF16__
  if (k == TILES) return tiles_granted();
#endif
  return k == READ || k == F32;
}

static void *measure(void *argument) {
  struct Thread *self = argument;
  pthread_barrier_wait(&barrier);
  self->began = now();
  switch (kind) {
    case READ: self->work = read_all(self->memory, bytes_per_thread, &self->sink); break;
    case F32: self->work = f32_products(5000000, &self->sink); break;
#ifdef __AVX512BF16__
    case BF16: self->work = bf16_products(5000000, &self->sink); break;
#endif
#ifdef __AMX_BF16__
    case TILES: self->work = tile_products(1000000, &self->sink); break;
#endif
    default: break;
  }
  self->ended = now();
  return 0;
}

// Billions per second over all threads, from the first that begins to the last that ends: by their own clocks, as a thread that
// only watched would be given a processor late.
static double best(struct Thread *threads, int count, int rounds) {
  double most = 0;
  pthread_barrier_init(&barrier, 0, count);
  for (int round = 0; round < rounds; round++) {
    for (int i = 0; i < count; i++) pthread_create(&threads[i].handle, 0, measure, &threads[i]);
    double began = 0, ended = 0, work = 0;
    for (int i = 0; i < count; i++) {
      pthread_join(threads[i].handle, 0);
      if (!i || threads[i].began < began) began = threads[i].began;
      if (!i || threads[i].ended > ended) ended = threads[i].ended;
      work += threads[i].work;
    }
    if (work / (ended - began) * 1e-9 > most) most = work / (ended - began) * 1e-9;
  }
  pthread_barrier_destroy(&barrier);
  return most;
}

int main(int argc, char **argv) {
  int count = argc > 1 ? atoi(argv[1]) : 1, rounds = argc > 3 ? atoi(argv[3]) : 5;
  bytes_per_thread = (size_t)(argc > 2 ? atol(argv[2]) : 512) << 20;
  struct Thread *threads = calloc(count, sizeof *threads);
  for (int i = 0; i < count; i++) {
    threads[i].memory = aligned_alloc(2 << 20, bytes_per_thread);
    if (!threads[i].memory) return fprintf(stderr, "no memory\n"), 1;
    madvise(threads[i].memory, bytes_per_thread, MADV_HUGEPAGE);
    memset(threads[i].memory, 1, bytes_per_thread);
  }
  printf("{\"threads\": %d", count);
  for (int k = 0; k < KINDS; k++) {
    kind = k;
    if (argc > 4 && strcmp(argv[4], names[k])) continue;
    if (available(kind)) printf(", \"%s\": %.1f", names[k], best(threads, count, rounds));
  }
  printf("}\n");
  return 0;
}
