// Products with packed weights: the weights are the first operand of `mma`, the tokens the second.
//
// K is cut into segments by the layer's shape alone. A segment is summed from zero, k ascending; the segments' sums are
// added to zero, in ascending order. Every kernel here does just that, so the bits of an output do not depend on which
// of them computed it, or on what else they computed.
//
// K goes through shared memory in chunks of 64 bytes a row: of a panel (16 outputs) a chunk is 1 KiB, which lies
// together in the weights. `Rows` says which row of the operand a token is (NO_ROW: none, zeros stand for it); a thread
// asks it for token i as its `slot`th. `Out` takes the sums: of a fragment (16 outputs by 8 tokens, laid out as mma's
// `d`), or, where `Out::PANELS` is 2, of both fragments of two neighbouring panels. Its `prepare` is called while the
// first copies are under way, and what it leaves in shared memory may be read when sums are put.
#pragma once
#include "common.cuh"

constexpr unsigned ROW_BYTES = 64;
constexpr unsigned PANEL_BYTES = 16 * ROW_BYTES;

struct Weights {
  const unsigned char* first;  // panel 0
  unsigned panels;
  unsigned chunks;   // of a row
  unsigned segment;  // chunks of a segment; the last may be shorter
  __device__ __forceinline__ const unsigned char* panel(unsigned i) const {
    return first + size_t(i) * chunks * PANEL_BYTES;
  }
};

struct Tokens {
  const unsigned char* first;  // row 0
  unsigned row_bytes;          // from one to the next
  __device__ __forceinline__ const unsigned char* row(unsigned i) const { return first + size_t(i) * row_bytes; }
};

// Where 16 bytes of a row of tokens lie in a chunk. Rows are half as long as the banks are wide, so pairs of rows are
// permuted alike, and 8 rows' equal quarters touch every bank once.
__device__ __forceinline__ unsigned token_offset(unsigned row, unsigned quarter) {
  return row * ROW_BYTES + (quarter ^ row / 2 % 4) * 16;
}

// What a warp multiplies at once: P panels by 8 * NT tokens, 16 of K. A chunk at `a` (panels) and `b` (tokens) has two.
template <class T, unsigned P, unsigned NT>
struct Fragments {
  uint4 weights[P];
  unsigned tokens[NT][2];

  __device__ __forceinline__ void load(const unsigned char* a, const unsigned char* b, unsigned step, unsigned lane) {
    if constexpr (NT == 1) {
      // Half of it is of the other step.
      unsigned r[4];
      ldmatrix_x4(r, b + token_offset(lane % 8, lane / 8));
      tokens[0][0] = r[2 * step];
      tokens[0][1] = r[2 * step + 1];
    } else {
#pragma unroll
      for (unsigned j = 0; j < NT; j += 2) {
        unsigned r[4];
        ldmatrix_x4(r, b + token_offset((j + lane / 16) * 8 + lane % 8, step * 2 + lane / 8 % 2));
        tokens[j][0] = r[0];
        tokens[j][1] = r[1];
        tokens[j + 1][0] = r[2];
        tokens[j + 1][1] = r[3];
      }
    }
#pragma unroll
    for (unsigned p = 0; p < P; p++)
      weights[p] = *reinterpret_cast<const uint4*>(a + p * PANEL_BYTES + step * 512 + lane * 16);
  }

  __device__ __forceinline__ void add_to(float (&acc)[P][NT][4]) const {
#pragma unroll
    for (unsigned p = 0; p < P; p++) {
      const unsigned v[4] = {weights[p].x, weights[p].y, weights[p].z, weights[p].w};
#pragma unroll
      for (unsigned j = 0; j < NT; j++) mma<T>(acc[p][j], v, tokens[j]);
    }
  }
};

// acc += a chunk's product, by one warp.
template <class T, unsigned P, unsigned NT>
struct Chunk {
  static __device__ __forceinline__ void multiply(float (&acc)[P][NT][4], const unsigned char* a, const unsigned char* b,
                                                  unsigned lane) {
#pragma unroll
    for (unsigned step = 0; step < 2; step++) {
      Fragments<T, P, NT> fragments;
      fragments.load(a, b, step, lane);
      fragments.add_to(acc);
    }
  }
};

// Without tensor cores: each lane has the elements of `d` that mma would give it.
template <unsigned P, unsigned NT>
struct Chunk<float, P, NT> {
  static __device__ __forceinline__ void multiply(float (&acc)[P][NT][4], const unsigned char* a, const unsigned char* b,
                                                  unsigned lane) {
    const unsigned g = lane / 4, q = lane % 4;
#pragma unroll 1
    for (unsigned k = 0; k < 16; k += 2) {
      float2 tokens[NT][2];
#pragma unroll
      for (unsigned j = 0; j < NT; j++)
#pragma unroll
        for (unsigned c = 0; c < 2; c++)
          tokens[j][c] = *reinterpret_cast<const float2*>(b + token_offset(j * 8 + 2 * q + c, k / 4) + k % 4 * 4);
#pragma unroll
      for (unsigned p = 0; p < P; p++)
#pragma unroll
        for (unsigned h = 0; h < 2; h++) {
          const float2 weights =
              *reinterpret_cast<const float2*>(a + p * PANEL_BYTES + packed_index(g + 8 * h, k, 1) * 4);
#pragma unroll
          for (unsigned j = 0; j < NT; j++)
#pragma unroll
            for (unsigned c = 0; c < 2; c++) {
              float& sum = acc[p][j][2 * h + c];
              sum = fmaf(weights.y, tokens[j][c].y, fmaf(weights.x, tokens[j][c].x, sum));
            }
        }
    }
  }
};

// ---- Few tokens: every warp takes a segment, and its own way through shared memory.

template <unsigned P, unsigned NT>
constexpr unsigned SPLIT_STAGE = P * PANEL_BYTES + NT * 8 * ROW_BYTES;

// As many as 8 warps have in 80 KiB, so that two blocks or three fit a multiprocessor; but enough to have two chunks on
// their way while one is used.
template <unsigned P, unsigned NT>
constexpr unsigned SPLIT_STAGES = 10240 / SPLIT_STAGE<P, NT> > 6   ? 6
                                  : 10240 / SPLIT_STAGE<P, NT> < 3 ? 3
                                                                   : 10240 / SPLIT_STAGE<P, NT>;

// Tokens rows(0..8 * NT) by P panels a warp. A block is whole groups of warps, one warp a segment; the groups of all
// blocks along x take the panels in turn.
template <class T, unsigned P, unsigned NT, class Rows, class Out>
__device__ __forceinline__ void split_product(unsigned char* smem, const Weights& w, const Tokens& x, const Rows& rows,
                                              const Out& out) {
  constexpr unsigned STAGE = SPLIT_STAGE<P, NT>, STAGES = SPLIT_STAGES<P, NT>, H = Out::PANELS;
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned splits = ceil_div(w.chunks, w.segment), split = warp % splits, group = warp / splits;
  const unsigned first_panel = (blockIdx.x * (blockDim.x / 32 / splits) + group) * P;
  const unsigned begin = split * w.segment, chunks = umin(w.segment, w.chunks - begin);
  unsigned char* own = smem + warp * (STAGES * STAGE);

  // What is absent is not read, but still needs an address.
  const unsigned char *panel[P], *row[NT];
  bool has_panel[P], has_row[NT];
#pragma unroll
  for (unsigned p = 0; p < P; p++) {
    has_panel[p] = first_panel + p < w.panels;
    panel[p] = w.panel(has_panel[p] ? first_panel + p : 0) + size_t(begin) * PANEL_BYTES + lane * 16;
  }
#pragma unroll
  for (unsigned j = 0; j < NT; j++) {
    const unsigned i = rows(j, j * 8 + lane / 4);
    has_row[j] = i != NO_ROW;
    row[j] = x.row(has_row[j] ? i : 0) + begin * ROW_BYTES + lane % 4 * 16;
  }
  // The next chunk.
  auto load = [&](unsigned char* stage) {
#pragma unroll
    for (unsigned p = 0; p < P; p++) {
#pragma unroll
      for (unsigned half = 0; half < 2; half++)
        cp_async16(stage + p * PANEL_BYTES + half * 512 + lane * 16, panel[p] + half * 512, has_panel[p]);
      panel[p] += PANEL_BYTES;
    }
#pragma unroll
    for (unsigned j = 0; j < NT; j++) {
      cp_async16(stage + P * PANEL_BYTES + token_offset(j * 8 + lane / 4, lane % 4), row[j], has_row[j]);
      row[j] += ROW_BYTES;
    }
  };

  for (unsigned i = 0; i + 1 < STAGES; i++) {
    if (i < chunks) load(own + i * STAGE);
    cp_async_commit();
  }
  out.prepare();
  float acc[P][NT][4] = {};
  unsigned slot = 0;
  for (unsigned chunk = 0; chunk < chunks; chunk++) {
    cp_async_wait<STAGES - 2>();
    // Each lane waited for its own copies of this chunk: behind the barrier all lanes' are there. And all lanes have
    // read the chunk before, whose stage is the next to be filled. No other warp touches this warp's stages.
    __syncwarp();
    if (chunk + STAGES - 1 < chunks) load(own + (slot == 0 ? STAGES - 1 : slot - 1) * STAGE);
    cp_async_commit();
    Chunk<T, P, NT>::multiply(acc, own + slot * STAGE, own + slot * STAGE + P * PANEL_BYTES, lane);
    slot = slot + 1 == STAGES ? 0 : slot + 1;
  }
  cp_async_wait<0>();

  // The segments' sums meet in the warps' own stages, which all their lanes have read by now.
  static_assert(P * NT * 512 <= STAGES * STAGE, "sums fit where the stages were");
  __syncwarp();
#pragma unroll
  for (unsigned p = 0; p < P; p++)
#pragma unroll
    for (unsigned j = 0; j < NT; j++)
      reinterpret_cast<float4*>(own)[(p * NT + j) * 32 + lane] =
          make_float4(acc[p][j][0], acc[p][j][1], acc[p][j][2], acc[p][j][3]);
  __syncthreads();
  for (unsigned unit = split; unit < P / H * NT; unit += splits) {
    const unsigned p = unit / NT, j = unit % NT;
    float total[H][4] = {};
    for (unsigned s = 0; s < splits; s++) {
      const float4* sums = reinterpret_cast<const float4*>(smem + (group * splits + s) * (STAGES * STAGE));
#pragma unroll
      for (unsigned h = 0; h < H; h++) {
        const float4 sum = sums[((p * H + h) * NT + j) * 32 + lane];
        total[h][0] += sum.x;
        total[h][1] += sum.y;
        total[h][2] += sum.z;
        total[h][3] += sum.w;
      }
    }
    out.put(first_panel / H + p, j, total);
  }
}

// ---- Many tokens: a block takes a tile, all of K; its WM x WN warps share the stages.

template <unsigned WM, unsigned WN, unsigned P, unsigned NT>
constexpr unsigned TILE_STAGE = WM * P * PANEL_BYTES + WN * NT * 8 * ROW_BYTES;

constexpr unsigned TILE_STAGES = 5;

// Tokens rows(0..8 * WN * NT) by WM * P panels from `first_panel`.
template <class T, unsigned WM, unsigned WN, unsigned P, unsigned NT, class Rows, class Out>
__device__ __forceinline__ void tile_product(unsigned char* smem, const Weights& w, const Tokens& x, unsigned first_panel,
                                             const Rows& rows, const Out& out) {
  constexpr unsigned STAGE = TILE_STAGE<WM, WN, P, NT>, STAGES = TILE_STAGES, H = Out::PANELS;
  constexpr unsigned THREADS = WM * WN * 32, A = WM * P * 64 / THREADS, B = WN * NT * 32 / THREADS;
  static_assert(WM * P * 64 % THREADS == 0 && WN * NT * 32 % THREADS == 0, "every thread copies as much");
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp % WM, warp_n = warp / WM;

  // What is absent is not read, but still needs an address.
  const unsigned char *panel[A], *row[B];
  bool has_panel[A], has_row[B];
#pragma unroll
  for (unsigned i = 0; i < A; i++) {
    const unsigned p = first_panel + threadIdx.x / 64 + i * (THREADS / 64);
    has_panel[i] = p < w.panels;
    panel[i] = w.panel(has_panel[i] ? p : 0) + threadIdx.x % 64 * 16;
  }
#pragma unroll
  for (unsigned i = 0; i < B; i++) {
    const unsigned token = rows(i, threadIdx.x / 4 + i * (THREADS / 4));
    has_row[i] = token != NO_ROW;
    row[i] = x.row(has_row[i] ? token : 0) + threadIdx.x % 4 * 16;
  }
  // The next chunk.
  auto load = [&](unsigned char* stage) {
#pragma unroll
    for (unsigned i = 0; i < A; i++) {
      cp_async16(stage + threadIdx.x * 16 + i * (THREADS * 16), panel[i], has_panel[i]);
      panel[i] += PANEL_BYTES;
    }
#pragma unroll
    for (unsigned i = 0; i < B; i++) {
      cp_async16(stage + WM * P * PANEL_BYTES + token_offset(threadIdx.x / 4 + i * (THREADS / 4), threadIdx.x % 4), row[i],
                 has_row[i]);
      row[i] += ROW_BYTES;
    }
  };

  for (unsigned i = 0; i + 1 < STAGES; i++) {
    if (i < w.chunks) load(smem + i * STAGE);
    cp_async_commit();
  }
  out.prepare();
  const unsigned a = warp_m * (P * PANEL_BYTES), b = WM * P * PANEL_BYTES + warp_n * (NT * 8 * ROW_BYTES);
  float total[P][NT][4] = {}, acc[P][NT][4] = {};
  cp_async_wait<STAGES - 2>();
  __syncthreads();  // the first chunk is there
  // With tensor cores, the next step's fragments are loaded while a step's are multiplied.
  constexpr bool CORES = sizeof(T) == 2;
  [[maybe_unused]] Fragments<T, P, NT> even, odd;
  if constexpr (CORES) even.load(smem + a, smem + b, 0, lane);
  unsigned char* stage = smem;
  for (unsigned chunk = 0; chunk < w.chunks;) {
    for (const unsigned end = umin(chunk + w.segment, w.chunks); chunk < end; chunk++) {
      if constexpr (CORES) {
        odd.load(stage + a, stage + b, 1, lane);
        even.add_to(acc);
      } else {
        Chunk<T, P, NT>::multiply(acc, stage + a, stage + b, lane);
      }
      cp_async_wait<STAGES - 3>();
      // Each thread waited for its own copies of the next chunk: behind the barrier all threads' are there. And all
      // warps have read all of this chunk and of the one before, whose stage is the next to be filled.
      __syncthreads();
      unsigned char* filled = stage == smem ? smem + (STAGES - 1) * STAGE : stage - STAGE;
      stage = stage == smem + (STAGES - 1) * STAGE ? smem : stage + STAGE;
      if constexpr (CORES)
        if (chunk + 1 < w.chunks) even.load(stage + a, stage + b, 0, lane);
      if (chunk + STAGES - 1 < w.chunks) load(filled);
      cp_async_commit();
      if constexpr (CORES) odd.add_to(acc);
    }
#pragma unroll
    for (unsigned p = 0; p < P; p++)
#pragma unroll
      for (unsigned j = 0; j < NT; j++)
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
          total[p][j][i] += acc[p][j][i];
          acc[p][j][i] = 0.f;
        }
  }
  cp_async_wait<0>();
#pragma unroll
  for (unsigned p = 0; p < P; p += H)
#pragma unroll
    for (unsigned j = 0; j < NT; j++) {
      float sums[H][4];
#pragma unroll
      for (unsigned h = 0; h < H; h++)
#pragma unroll
        for (unsigned i = 0; i < 4; i++) sums[h][i] = total[p + h][j][i];
      out.put((first_panel + warp_m * P + p) / H, warp_n * NT + j, sums);
    }
}

// Rows first.. of the operand, up to `end`.
struct RowRange {
  unsigned first, end;
  __device__ __forceinline__ unsigned operator()(unsigned, unsigned i) const {
    return first + i < end ? first + i : NO_ROW;
  }
};
