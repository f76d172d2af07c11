// The module for tests: launch arithmetic, and kernels emulated on the CPU. Never shipped.

#include <cuda_runtime.h>

#include "bindings.h"

PYBIND11_MODULE(dcx_csrc_tests, m) {
  m.def("last_first", [](bool on) { dcx::emulated::last_first = on; });
  for (const Bindings::Function function : Bindings::all()) function(m);
}
