// The stream that torch computes on now.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

namespace dcx {

// Looked up in the library that torch has loaded: linking it would need a torch built for CUDA.
inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    STD_TORCH_CHECK(library != nullptr, "expected a torch built for CUDA, got one without");
    void* found = dlsym(library, "aoti_torch_get_current_cuda_stream");
    STD_TORCH_CHECK(found != nullptr, "expected torch >= 2.11, got one without streams");
    return reinterpret_cast<Function>(found);
  }();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace dcx
