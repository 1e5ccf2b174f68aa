// Modules hold no kernels of their own: functions are those of the emulation, by name.
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "context.h"
#include "queue.h"

using namespace stand_in;

extern "C" int moetrail_emulate(const char*, const unsigned*, unsigned, size_t, void**);
extern "C" const size_t* moetrail_parameters(const char* kernel, size_t* count);

static int next_module;

struct Function {
  std::string name;
  std::vector<size_t> sizes;
  int shared = 49152 - 128;
};

extern "C" {

CUresult cuModuleLoadData(CUmodule* mod, const void* image) {
  LOCK;
  IN_CONTEXT;
  DEMAND((size_t)image % 64 == 0);
  DEMAND(*(const unsigned*)image == 0xba55ed50u);
  *mod = (CUmodule)(size_t)(100 + next_module++);
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule) {
  LOCK;
  IN_CONTEXT;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* f, CUmodule mod, const char* name) {
  LOCK;
  IN_CONTEXT;
  size_t n;
  const size_t* s = moetrail_parameters(name, &n);
  // Every other module lacks it, so that a search is a search.
  if (!s || ((size_t)mod - 100) % 2 == 0) return CUDA_ERROR_NOT_FOUND;
  *f = (CUfunction) new Function{name, {s, s + n}};
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction f) {
  LOCK;
  IN_CONTEXT;
  Function* fn = (Function*)f;
  switch (a) {
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *v = 128;
      break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *v = 1024;
      break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *v = fn->shared;
      break;
    default:
      bad("func attribute");
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  LOCK;
  IN_CONTEXT;
  DEMAND(a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
  if (v + 128 > 232448) return CUDA_ERROR_INVALID_VALUE;
  ((Function*)f)->shared = v;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetParamInfo(CUfunction f, size_t i, size_t* o, size_t* s) {
  Function* fn = (Function*)f;
  if (i >= fn->sizes.size()) return CUDA_ERROR_INVALID_VALUE;
  *o = 0;
  *s = fn->sizes[i];
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                        unsigned sh, CUstream st, void** params, void** extra) {
  LOCK;
  IN_CONTEXT;
  DEMAND(extra == nullptr);
  Function* fn = (Function*)f;
  if (!x || !y || !z || !bx || by != 1 || bz != 1 || bx > 1024 || y > 65535 || z > 65535 || (int)sh > fn->shared)
    return CUDA_ERROR_INVALID_VALUE;
  auto copies = std::make_shared<std::vector<std::vector<char>>>();
  for (size_t i = 0; i < fn->sizes.size(); i++) {
    const char* p = (const char*)params[i];
    copies->emplace_back(p, p + fn->sizes[i]);
  }
  issue(queue_of(st), [=] {
    std::vector<void*> ptrs;
    std::vector<uint64_t> vals(copies->size());
    for (size_t i = 0; i < copies->size(); i++) {
      memcpy(&vals[i], (*copies)[i].data(), (*copies)[i].size());
      ptrs.push_back(&vals[i]);
    }
    unsigned grid[3] = {x, y, z};
    DEMAND(moetrail_emulate(fn->name.c_str(), grid, bx, sh, ptrs.data()) == 0);
  });
  return CUDA_SUCCESS;
}

}  // extern "C"
