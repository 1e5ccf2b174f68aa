#include "emulation.h"

// Returns 1 for a kernel that is not there.
extern "C" int moetrail_emulate(const char* name, const unsigned* grid, unsigned threads, size_t smem, void** args) {
  const auto kernel = emu::table().find(name);
  if (kernel == emu::table().end()) return 1;
  emu::run(kernel->second.call, dim3(grid[0], grid[1], grid[2]), dim3(threads), smem, args);
  return 0;
}

// Bytes of a kernel's parameters; null for a kernel that is not there.
extern "C" const size_t* moetrail_parameters(const char* name, size_t* count) {
  const auto kernel = emu::table().find(name);
  if (kernel == emu::table().end()) return nullptr;
  *count = kernel->second.parameters.size();
  return kernel->second.parameters.data();
}
