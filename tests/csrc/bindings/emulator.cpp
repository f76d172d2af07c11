// Kernels, right and wrong, that try the emulator itself.

#include "bindings.h"
#include "cuda/launch.cuh"

namespace {

constexpr cudaStream_t stream = nullptr;

__global__ void reverse_and_sum(const float* x, float* y, int n) {
  float* shared = reinterpret_cast<float*>(dcx::shared_memory());
  const int i = threadIdx.x, size = blockDim.x;
  const int place = blockIdx.x * size + i;
  shared[i] = place < n ? __ldg(x + place) : 0.0f;
  __syncthreads();
  float sum = shared[size - 1 - i];
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  if (i % 32 == 0) atomicAdd(y + blockIdx.x, sum);
}

__global__ void few_at_barrier() {
  if (threadIdx.x < 3) __syncthreads();
}
__global__ void one_lane_ends() {
  if (threadIdx.x == 5) return;
  __syncwarp();
}
__global__ void different_collectives() {
  if (threadIdx.x < 5) {
    __syncwarp();
  } else {
    __any_sync(0xffffffffu, true);
  }
}
__global__ void nothing() {}
__global__ void misaligned(const char* memory) {
  __ldg(reinterpret_cast<const int4*>(memory + 4));
}
__global__ void uninitialised(float* y) {
  y[threadIdx.x] = reinterpret_cast<float*>(dcx::shared_memory())[threadIdx.x];
}
__global__ void without_barrier(float* y) {
  float* shared = reinterpret_cast<float*>(dcx::shared_memory());
  shared[threadIdx.x] = 1.0f;
  y[threadIdx.x] = shared[63 - threadIdx.x];
}
__global__ void collectives(int* y) {
  const int lane = threadIdx.x;
  const unsigned all = 0xffffffffu;
  y[lane] = __shfl_down_sync(all, lane, 3);
  y[32 + lane] = __shfl_up_sync(all, lane, 3, 8);
  y[64 + lane] = __shfl_xor_sync(all, lane, 5);
  y[96 + lane] = __shfl_sync(all, lane, 2, 16);
  y[128 + lane] = static_cast<int>(__ballot_sync(all, lane % 3 == 0));
}

void broken(const std::string& which) {
  alignas(16) static const char memory[32] = {};
  if (which == "barrier") DCX_LAUNCH(few_at_barrier, 1, 64, 0, stream);
  if (which == "ended") DCX_LAUNCH(one_lane_ends, 1, 64, 0, stream);
  if (which == "mixed") DCX_LAUNCH(different_collectives, 1, 32, 0, stream);
  if (which == "shared") DCX_LAUNCH(nothing, 1, 32, 1 << 20, stream);
  if (which == "threads") DCX_LAUNCH(nothing, 1, 1025, 0, stream);
  if (which == "misaligned") DCX_LAUNCH(misaligned, 1, 1, 0, stream, memory);
}

const Bindings here([](py::module_& m) {
  m.def("broken", &broken);
  m.def("reverse_and_sum", [](std::uintptr_t x, std::uintptr_t y, int n, int bytes) {
    DCX_LAUNCH(reverse_and_sum, 3, 256, bytes, stream, at<const float>(x), at<float>(y), n);
  });
  m.def("uninitialised", [](std::uintptr_t y) {
    DCX_LAUNCH(uninitialised, 1, 32, 128, stream, at<float>(y));
  });
  m.def("without_barrier", [](std::uintptr_t y) {
    DCX_LAUNCH(without_barrier, 1, 64, 256, stream, at<float>(y));
  });
  m.def("collectives", [](std::uintptr_t y) {
    DCX_LAUNCH(collectives, 1, 32, 0, stream, at<int>(y));
  });
});

}  // namespace
