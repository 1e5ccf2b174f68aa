// The one device, as the environment would have it, and what errors are called.
#include <cstdio>
#include <cstdlib>

#include "context.h"

extern "C" {

CUresult cuDriverGetVersion(int* v) {
  *v = getenv("EMULATED_CUDA_VERSION") ? atoi(getenv("EMULATED_CUDA_VERSION")) : 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* n) {
  DEMAND(stand_in::started());
  *n = getenv("EMULATED_CUDA_COUNT") ? atoi(getenv("EMULATED_CUDA_COUNT")) : 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* d, int i) {
  DEMAND(stand_in::started());
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
      stand_in::bad("attribute");
  }
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

}  // extern "C"
