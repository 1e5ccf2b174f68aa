// Memory of the device and pinned memory lie on the heap, filled with what nobody may rely on.
#include <cstdlib>
#include <cstring>
#include <map>

#include "context.h"
#include "queue.h"

using namespace stand_in;

static std::map<CUdeviceptr, size_t> dev;
static std::map<char*, size_t> pinned;

static void in_dev(CUdeviceptr p, size_t n) {
  auto it = dev.upper_bound(p);
  DEMAND(it != dev.begin());
  --it;
  DEMAND(p + n <= it->first + it->second);
}

static void in_pin(const void* q, size_t n) {
  char* p = (char*)q;
  auto it = pinned.upper_bound(p);
  DEMAND(it != pinned.begin());
  --it;
  DEMAND(p + n <= it->first + it->second);
}

extern "C" {

CUresult cuMemGetInfo(size_t* f, size_t* t) {
  LOCK;
  IN_CONTEXT;
  *t = size_t(1) << 30;
  size_t u = 0;
  for (auto& d : dev) u += d.second;
  *f = *t - u;
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr* p, size_t n) {
  LOCK;
  IN_CONTEXT;
  DEMAND(n > 0);
  size_t f, t;
  cuMemGetInfo(&f, &t);
  if (n > f) return CUDA_ERROR_OUT_OF_MEMORY;
  void* q = aligned_alloc(256, (n + 255) / 256 * 256);
  memset(q, 0xff, n);
  *p = (CUdeviceptr)q;
  dev[*p] = n;
  return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr p) {
  LOCK;
  IN_CONTEXT;
  DEMAND(dev.count(p));
  dev.erase(p);
  free((void*)p);
  return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void** p, size_t n, unsigned f) {
  LOCK;
  IN_CONTEXT;
  DEMAND(f == CU_MEMHOSTALLOC_PORTABLE && n > 0);
  *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096);
  memset(*p, 0xee, n);
  pinned[(char*)*p] = n;
  return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void* p) {
  LOCK;
  IN_CONTEXT;
  DEMAND(pinned.erase((char*)p));
  free(p);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr d, const void* s, size_t n, CUstream st) {
  LOCK;
  IN_CONTEXT;
  in_dev(d, n);
  in_pin(s, n);
  issue(queue_of(st), [=] { memcpy((void*)d, s, n); });
  return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoHAsync(void* d, CUdeviceptr s, size_t n, CUstream st) {
  LOCK;
  IN_CONTEXT;
  in_pin(d, n);
  in_dev(s, n);
  issue(queue_of(st), [=] { memcpy(d, (void*)s, n); });
  return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream st) {
  LOCK;
  IN_CONTEXT;
  in_dev(d, n);
  in_dev(s, n);
  issue(queue_of(st), [=] { memmove((void*)d, (void*)s, n); });
  return CUDA_SUCCESS;
}

CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D* p, CUstream st) {
  LOCK;
  IN_CONTEXT;
  CUDA_MEMCPY2D c = *p;
  DEMAND(c.srcXInBytes == 0 && c.srcY == 0 && c.dstXInBytes == 0 && c.dstY == 0 && !c.srcArray && !c.dstArray);
  DEMAND(c.WidthInBytes > 0 && c.Height > 0);
  if (c.srcPitch < c.WidthInBytes || c.dstPitch < c.WidthInBytes || c.srcPitch >= 1u << 31 || c.dstPitch >= 1u << 31)
    return CUDA_ERROR_INVALID_VALUE;
  size_t sn = c.srcPitch * (c.Height - 1) + c.WidthInBytes, dn = c.dstPitch * (c.Height - 1) + c.WidthInBytes;
  const char* s;
  char* d;
  if (c.srcMemoryType == CU_MEMORYTYPE_HOST) {
    in_pin(c.srcHost, sn);
    s = (const char*)c.srcHost;
  } else {
    DEMAND(c.srcMemoryType == CU_MEMORYTYPE_DEVICE);
    in_dev(c.srcDevice, sn);
    s = (const char*)c.srcDevice;
  }
  if (c.dstMemoryType == CU_MEMORYTYPE_HOST) {
    in_pin(c.dstHost, dn);
    d = (char*)c.dstHost;
  } else {
    DEMAND(c.dstMemoryType == CU_MEMORYTYPE_DEVICE);
    in_dev(c.dstDevice, dn);
    d = (char*)c.dstDevice;
  }
  issue(queue_of(st), [=] {
    for (size_t r = 0; r < c.Height; r++) memcpy(d + r * c.dstPitch, s + r * c.srcPitch, c.WidthInBytes);
  });
  return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr d, unsigned char v, size_t n, CUstream st) {
  LOCK;
  IN_CONTEXT;
  in_dev(d, n);
  issue(queue_of(st), [=] { memset((void*)d, v, n); });
  return CUDA_SUCCESS;
}

}  // extern "C"
