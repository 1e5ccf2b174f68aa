// What every call demands: a driver that was started, and a thread in its one context. What the engine has no business to
// do ends the process.
#pragma once
#include <cuda.h>

#include <mutex>

namespace stand_in {

extern std::recursive_mutex mutex;

[[noreturn]] void bad(const char* what);
bool started();
bool in_context();

}  // namespace stand_in

#define LOCK std::lock_guard<std::recursive_mutex> lock(stand_in::mutex)
#define DEMAND(c)                \
  do {                           \
    if (!(c)) stand_in::bad(#c); \
  } while (0)
#define IN_CONTEXT             \
  DEMAND(stand_in::started()); \
  DEMAND(stand_in::in_context())
