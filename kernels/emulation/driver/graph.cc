// Graphs: what was issued to a stream between the beginning of a capture and its end.
#include <set>

#include "context.h"
#include "queue.h"

using namespace stand_in;

static std::set<Recording*> graphs, execs;

extern "C" {

CUresult cuStreamBeginCapture(CUstream s, CUstreamCaptureMode mode) {
  LOCK;
  IN_CONTEXT;
  DEMAND(mode == CU_STREAM_CAPTURE_MODE_RELAXED && !queue_of(s)->recording);
  queue_of(s)->recording = new Recording{{}, std::this_thread::get_id()};
  return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream s, CUgraph* g) {
  LOCK;
  IN_CONTEXT;
  if (!queue_of(s)->recording) return CUDA_ERROR_ILLEGAL_STATE;
  DEMAND(queue_of(s)->recording->by == std::this_thread::get_id());
  graphs.insert(queue_of(s)->recording);
  *g = (CUgraph)queue_of(s)->recording;
  queue_of(s)->recording = nullptr;
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
  DEMAND(execs.count((Recording*)g) && !queue_of(s)->recording);
  for (auto& op : ((Recording*)g)->ops) issue(queue_of(s), op);
  return CUDA_SUCCESS;
}

}  // extern "C"
