// Found before CUDA's own header of this name: a .cu becomes C++ that runs on the CPU.
//
// CUDA's header gives types and 16-bit floats; without nvcc it knows nothing of kernels. Blocks run
// one after the other; memory is the host's. Shared memory comes from dcx::shared_memory(), full of
// NaN for every block. A kernel that waits for threads that never come raises; so does one that
// writes behind its shared memory.
#pragma once

#ifndef DCX_EMULATED
#error "tests/csrc/emulated is for -DDCX_EMULATED only"
#endif

#include_next <cuda_runtime.h>

#undef __shared__
#define __shared__ take_it_from_dcx_shared_memory  // a variable could not be poisoned

#undef __launch_bounds__
#define __launch_bounds__(...)

#include "intrinsics.h"
