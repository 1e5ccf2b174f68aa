// What streams hold until something waits for them: work, and moments of events to be passed or awaited.
#pragma once
#include <cuda.h>

#include <deque>
#include <functional>
#include <thread>
#include <vector>

namespace stand_in {

struct Queue;

// An event: how often it was recorded, and how many of these were passed.
struct Moment {
  long recorded = 0, done = 0;
  Queue* on = nullptr;
};

struct Op {
  enum Kind { WORK, PASS, AWAIT } kind;
  std::function<void()> run;
  Moment* moment;
  long count;
};

// A graph.
struct Recording {
  std::vector<std::function<void()>> ops;
  std::thread::id by;
};

struct Queue {
  std::deque<Op> ops;
  // What is issued meanwhile is recorded, not queued.
  Recording* recording = nullptr;
};

// Those of a handle that is a stream's or an event's.
Queue* queue_of(CUstream s);
Moment* moment_of(CUevent e);

void issue(Queue* queue, std::function<void()> work);

}  // namespace stand_in
