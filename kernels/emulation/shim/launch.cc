#include "emulation.h"

// Returns 1 for a kernel that is not there.
extern "C" int moetrail_emulate(const char* name, const unsigned* grid, unsigned threads, size_t smem, void** args) {
  const auto kernel = emu::table().find(name);
  if (kernel == emu::table().end()) return 1;
  emu::run(kernel->second, dim3(grid[0], grid[1], grid[2]), dim3(threads), smem, args);
  return 0;
}
