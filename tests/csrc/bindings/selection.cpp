// The global top-k and the per-sample gate: launch arithmetic, and the kernels emulated.

#include "bindings.h"
#include "cuda/gate.h"
#include "cuda/selection.h"
#include "launch/selection.h"

namespace {

const Bindings here([](py::module_& m) {
  m.def("select_threads", &dcx::select_threads);
  m.def("select_channels",
        [](std::uintptr_t scores, std::uintptr_t bounds, std::uintptr_t keys, std::uintptr_t limit,
           std::uintptr_t indices, std::uintptr_t inverse, std::uintptr_t counts, int total,
           int groups, int budget, int min_active, bool is_double) {
          dcx::select_channels({at(scores), at<const int64_t>(bounds), at(keys),
                                at<int64_t>(limit), at<int64_t>(indices), at<int64_t>(inverse),
                                at<int64_t>(counts), total, groups, budget, min_active, is_double},
                               nullptr);
        });
  m.def("k_winners", [](std::uintptr_t g, std::uintptr_t indices, std::uintptr_t values,
                        int64_t stride_n, int64_t stride_c, int samples, int channels, int winners,
                        int type) {
    dcx::k_winners({at(g), at<int64_t>(indices), at(values), stride_n, stride_c, samples, channels,
                    winners},
                   static_cast<dcx::GateType>(type), nullptr);
  });
});

}  // namespace
