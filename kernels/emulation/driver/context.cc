#include "context.h"

#include <cstdio>
#include <cstdlib>

static bool inited;
static int retained;
static int the_context;
static thread_local void* current;

namespace stand_in {

std::recursive_mutex mutex;

void bad(const char* what) {
  fprintf(stderr, "libcuda stand-in: %s\n", what);
  abort();
}
bool started() { return inited; }
bool in_context() { return current == &the_context && retained > 0; }

}  // namespace stand_in

static int fail_init() {
  const char* e = getenv("EMULATED_CUDA_INIT");
  return e ? atoi(e) : 0;
}

extern "C" {

CUresult cuInit(unsigned f) {
  DEMAND(f == 0);
  if (fail_init()) return (CUresult)fail_init();
  inited = true;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) {
  LOCK;
  DEMAND(d == 7);
  retained++;
  *c = (CUcontext)&the_context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice d) {
  LOCK;
  DEMAND(d == 7 && retained > 0);
  retained--;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext c) {
  DEMAND(c == (CUcontext)&the_context && retained > 0);
  current = c;
  return CUDA_SUCCESS;
}

}  // extern "C"
