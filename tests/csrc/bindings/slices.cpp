#include "bindings.h"
#include "cuda/slice_optimizer.h"
#include "cuda/slices.h"

namespace {

const Bindings here([](py::module_& m) {
  m.def("move_slices", [](std::uintptr_t table, int count, int columns, int blocks,
                          int element_size, bool scatter, int cast) {
    dcx::move_slices({at<const int64_t>(table), count, columns, blocks, element_size, scatter,
                      static_cast<dcx::Cast>(cast)},
                     nullptr);
  });
  m.def("sgd_slices",
        [](std::uintptr_t table, int count, int columns, int blocks, int dtype, float lr,
           float momentum, float undamped, float weight_decay, float sign, bool has_momentum,
           bool nesterov) {
          dcx::sgd_slices({{at<const int64_t>(table), count, columns, blocks,
                            static_cast<dcx::Float>(dtype)},
                           lr, momentum, undamped, weight_decay, sign, has_momentum, nesterov},
                          nullptr);
        });
  m.def("adamw_slices",
        [](std::uintptr_t table, int count, int columns, int blocks, int dtype, float decay,
           float beta1, float rest1, float beta2, float rest2, float eps, float sign,
           bool amsgrad) {
          dcx::adamw_slices({{at<const int64_t>(table), count, columns, blocks,
                              static_cast<dcx::Float>(dtype)},
                             decay, beta1, rest1, beta2, rest2, eps, sign, amsgrad},
                            nullptr);
        });
});

}  // namespace
