// Streams advance when something waits for them, or by chance when an event is asked for.
#include "queue.h"

#include <algorithm>
#include <cstdlib>
#include <set>

#include "context.h"

using namespace stand_in;

static std::set<Queue*> streams;
static std::set<Moment*> events;

static void settle(Moment* moment, long count);

static void step(Queue* queue) {
  Op op = queue->ops.front();
  queue->ops.pop_front();
  switch (op.kind) {
    case Op::WORK:
      op.run();
      break;
    case Op::PASS:
      op.moment->done = std::max(op.moment->done, op.count);
      break;
    case Op::AWAIT:
      settle(op.moment, op.count);
  }
}

static void settle(Moment* moment, long count) {
  while (moment->done < count) {
    DEMAND(moment->on && !moment->on->ops.empty());
    step(moment->on);
  }
}

static void drain(Queue* queue) {
  while (!queue->ops.empty()) step(queue);
}

Queue* stand_in::queue_of(CUstream s) {
  Queue* queue = (Queue*)s;
  DEMAND(streams.count(queue));
  return queue;
}

Moment* stand_in::moment_of(CUevent e) {
  Moment* moment = (Moment*)e;
  DEMAND(events.count(moment));
  return moment;
}

void stand_in::issue(Queue* queue, std::function<void()> work) {
  if (!queue->recording) return queue->ops.push_back({Op::WORK, work, nullptr, 0});
  // Of another thread it would be recorded by chance.
  DEMAND(queue->recording->by == std::this_thread::get_id());
  queue->recording->ops.push_back(work);
}

extern "C" {

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
  DEMAND(!queue_of(s)->recording);
  drain(queue_of(s));
  return CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream s, CUevent e, unsigned f) {
  LOCK;
  IN_CONTEXT;
  DEMAND(f == 0 && !queue_of(s)->recording);
  Moment* ev = moment_of(e);
  queue_of(s)->ops.push_back({Op::AWAIT, {}, ev, ev->recorded});
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
  DEMAND(!queue_of(s)->recording);
  if (ev->on && ev->on != queue_of(s)) settle(ev, ev->recorded);
  ev->on = queue_of(s);
  ev->recorded++;
  queue_of(s)->ops.push_back({Op::PASS, {}, ev, ev->recorded});
  return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent e) {
  LOCK;
  IN_CONTEXT;
  Moment* ev = moment_of(e);
  for (Queue* s : streams)
    if (!s->ops.empty() && rand() % 2) step(s);
  return ev->done >= ev->recorded ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuEventSynchronize(CUevent e) {
  LOCK;
  IN_CONTEXT;
  Moment* ev = moment_of(e);
  settle(ev, ev->recorded);
  return CUDA_SUCCESS;
}

}  // extern "C"
