// A libcuda.so.1 for machines without a GPU: it checks what it is given more strictly than the real one, and runs
// kernels by the emulation. Symbols and prototypes are those of cuda.h. Streams advance when something waits for them,
// or by chance when an event is asked for. A call that the engine has no business to make ends the process.
#include <cuda.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>
extern "C" int moetrail_emulate(const char*, const unsigned*, unsigned, size_t, void**);
extern "C" const size_t* moetrail_parameters(const char* kernel, size_t* count);
static std::recursive_mutex mutex;
#define LOCK std::lock_guard<std::recursive_mutex> lock(mutex)
[[noreturn]] static void bad(const char* what) {
  fprintf(stderr, "libcuda stand-in: %s\n", what);
  abort();
}
#define DEMAND(c)      \
  do {                 \
    if (!(c)) bad(#c); \
  } while (0)
static bool inited;
static int retained;
static int ctx_obj;
static thread_local void* current;
#define IN_CONTEXT \
  DEMAND(inited);  \
  DEMAND(current == &ctx_obj && retained > 0)
struct Moment {
  unsigned flags;
  long recorded = 0, done = 0;
  struct Queue* on = nullptr;
  bool dead = false;
};
struct Op {
  int kind;
  std::function<void()> run;
  Moment* ev;
  long v;
};
struct Recording {
  std::vector<std::function<void()>> ops;
  std::thread::id by;
};
struct Queue {
  std::deque<Op> q;
  bool capturing = false, spoilt = false;
  Recording* g = nullptr;
};
static std::set<Queue*> streams;
static std::set<Moment*> events;
static std::set<Recording*> graphs, execs;
static std::map<CUdeviceptr, size_t> dev;
static std::map<char*, size_t> pinned;
static void settle(Moment* e, long v);
static void step(Queue* s) {
  Op op = s->q.front();
  s->q.pop_front();
  if (op.kind == 0)
    op.run();
  else if (op.kind == 1)
    op.ev->done = std::max(op.ev->done, op.v);
  else
    settle(op.ev, op.v);
}
static void settle(Moment* e, long v) {
  while (e->done < v) {
    DEMAND(e->on && !e->on->q.empty());
    step(e->on);
  }
}
static void drain(Queue* s) {
  while (!s->q.empty()) step(s);
}
static void issue(Queue* s, std::function<void()> f) {
  if (!s->capturing) return s->q.push_back({0, f, nullptr, 0});
  // Of another thread it would be recorded by chance.
  DEMAND(s->g->by == std::this_thread::get_id());
  s->g->ops.push_back(f);
}
static Queue* queue_of(CUstream s) {
  Queue* p = (Queue*)s;
  DEMAND(streams.count(p));
  return p;
}
static Moment* moment_of(CUevent e) {
  Moment* p = (Moment*)e;
  DEMAND(events.count(p));
  return p;
}
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
CUresult cuGetErrorName(CUresult e, const char** s) {
  *s = e == 100   ? "CUDA_ERROR_NO_DEVICE"
       : e == 1   ? "CUDA_ERROR_INVALID_VALUE"
       : e == 2   ? "CUDA_ERROR_OUT_OF_MEMORY"
       : e == 500 ? "CUDA_ERROR_NOT_FOUND"
                  : nullptr;
  return *s ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorString(CUresult e, const char** s) {
  *s = e == 100 ? "no CUDA-capable device is detected"
       : e == 1 ? "invalid argument"
       : e == 2 ? "out of memory"
                : nullptr;
  return *s ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuDriverGetVersion(int* v) {
  *v = getenv("EMULATED_CUDA_VERSION") ? atoi(getenv("EMULATED_CUDA_VERSION")) : 13000;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* n) {
  DEMAND(inited);
  *n = getenv("EMULATED_CUDA_COUNT") ? atoi(getenv("EMULATED_CUDA_COUNT")) : 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* d, int i) {
  DEMAND(inited);
  if (i != 0) return CUDA_ERROR_INVALID_DEVICE;
  *d = 7;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* s, int n, CUdevice d) {
  DEMAND(d == 7);
  snprintf(s, n, "emulated GPU");
  return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem(size_t* n, CUdevice d) {
  DEMAND(d == 7);
  *n = size_t(1) << 30;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice d) {
  DEMAND(d == 7);
  switch (a) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *v = 3;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *v = 9;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *v = 0;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *v = 232448;
      break;
    default:
      bad("attribute");
  }
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) {
  LOCK;
  DEMAND(d == 7);
  retained++;
  *c = (CUcontext)&ctx_obj;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice d) {
  LOCK;
  DEMAND(d == 7 && retained > 0);
  retained--;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext c) {
  DEMAND(c == (CUcontext)&ctx_obj && retained > 0);
  current = c;
  return CUDA_SUCCESS;
}
CUresult cuStreamCreate(CUstream* s, unsigned f) {
  LOCK;
  IN_CONTEXT;
  DEMAND(f == CU_STREAM_NON_BLOCKING);
  Queue* p = new Queue;
  streams.insert(p);
  *s = (CUstream)p;
  return CUDA_SUCCESS;
}
CUresult cuStreamDestroy(CUstream s) {
  LOCK;
  IN_CONTEXT;
  drain(queue_of(s));
  streams.erase((Queue*)s);
  return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream s) {
  LOCK;
  IN_CONTEXT;
  DEMAND(!queue_of(s)->capturing);
  drain(queue_of(s));
  return CUDA_SUCCESS;
}
CUresult cuStreamWaitEvent(CUstream s, CUevent e, unsigned f) {
  LOCK;
  IN_CONTEXT;
  DEMAND(f == 0 && !queue_of(s)->capturing);
  Moment* ev = moment_of(e);
  queue_of(s)->q.push_back({2, {}, ev, ev->recorded});
  return CUDA_SUCCESS;
}
CUresult cuEventCreate(CUevent* e, unsigned f) {
  LOCK;
  IN_CONTEXT;
  DEMAND(f == CU_EVENT_DISABLE_TIMING);
  Moment* p = new Moment;
  events.insert(p);
  *e = (CUevent)p;
  return CUDA_SUCCESS;
}
CUresult cuEventDestroy(CUevent e) {
  LOCK;
  IN_CONTEXT;
  moment_of(e);
  events.erase((Moment*)e);
  return CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent e, CUstream s) {
  LOCK;
  IN_CONTEXT;
  Moment* ev = moment_of(e);
  DEMAND(!queue_of(s)->capturing);
  if (ev->on && ev->on != queue_of(s)) settle(ev, ev->recorded);
  ev->on = queue_of(s);
  ev->recorded++;
  queue_of(s)->q.push_back({1, {}, ev, ev->recorded});
  return CUDA_SUCCESS;
}
CUresult cuEventQuery(CUevent e) {
  LOCK;
  IN_CONTEXT;
  Moment* ev = moment_of(e);
  for (Queue* s : streams)
    if (!s->q.empty() && rand() % 2) step(s);
  return ev->done >= ev->recorded ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
CUresult cuEventSynchronize(CUevent e) {
  LOCK;
  IN_CONTEXT;
  Moment* ev = moment_of(e);
  settle(ev, ev->recorded);
  return CUDA_SUCCESS;
}
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
static int next_module;
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
struct Function {
  std::string name;
  std::vector<size_t> sizes;
  int shared = 49152 - 128;
};
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
CUresult cuStreamBeginCapture(CUstream s, CUstreamCaptureMode mode) {
  LOCK;
  IN_CONTEXT;
  DEMAND(mode == CU_STREAM_CAPTURE_MODE_RELAXED && !queue_of(s)->capturing);
  queue_of(s)->capturing = true;
  queue_of(s)->g = new Recording{{}, std::this_thread::get_id()};
  return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream s, CUgraph* g) {
  LOCK;
  IN_CONTEXT;
  if (!queue_of(s)->capturing) return CUDA_ERROR_ILLEGAL_STATE;
  DEMAND(queue_of(s)->g->by == std::this_thread::get_id());
  queue_of(s)->capturing = false;
  graphs.insert(queue_of(s)->g);
  *g = (CUgraph)queue_of(s)->g;
  return CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* x, CUgraph g, unsigned long long f) {
  LOCK;
  IN_CONTEXT;
  DEMAND(f == 0 && graphs.count((Recording*)g));
  Recording* e = new Recording(*(Recording*)g);
  execs.insert(e);
  *x = (CUgraphExec)e;
  return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph g) {
  LOCK;
  DEMAND(graphs.erase((Recording*)g));
  return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec g) {
  LOCK;
  DEMAND(execs.erase((Recording*)g));
  return CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec g, CUstream s) {
  LOCK;
  IN_CONTEXT;
  DEMAND(execs.count((Recording*)g) && !queue_of(s)->capturing);
  for (auto& op : ((Recording*)g)->ops) issue(queue_of(s), op);
  return CUDA_SUCCESS;
}
}
