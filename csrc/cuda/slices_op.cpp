// Checks of what describes a launch over slices; who made the table has looked at the tensors.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "checks.h"
#include "cuda/slice_optimizer.h"
#include "cuda/slices.h"
#include "cuda/stream.h"
#include "launch/slices.h"

namespace dcx {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

void check_table(const Tensor& table, int64_t blocks, int64_t own, const char* name) {
  DCX_CHECK(table.is_cuda() && table.scalar_type() == ScalarType::Long, name,
            "a table of int64 on a GPU", "another tensor");
  DCX_CHECK(table.dim() == 2 && table.is_contiguous(), name, "a contiguous table (lines, columns)",
            table.dim());
  DCX_CHECK(table.size(1) == kOwn + own, name, std::to_string(kOwn + own) + " columns", table.size(1));
  DCX_CHECK(blocks >= 0 && blocks < int64_t{1} << 31, name, "blocks of one launch", blocks);
  DCX_CHECK(blocks == 0 || table.size(0) > 0, name, "a line", table.size(0));
}

Float float_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float: return Float::kFloat;
    case ScalarType::Half: return Float::kHalf;
    case ScalarType::BFloat16: return Float::kBfloat16;
    default: DCX_CHECK(false, name, "float32, float16 or bfloat16", static_cast<int>(dtype));
  }
  return Float::kFloat;
}

SliceTable table_of(const Tensor& table, int64_t blocks, ScalarType dtype, const char* name) {
  return {table.const_data_ptr<int64_t>(), static_cast<int>(table.size(0)),
          static_cast<int>(table.size(1)), static_cast<int>(blocks), float_of(dtype, name)};
}

void move_slice_blocks(const Tensor& table, int64_t blocks, int64_t element_size, bool scatter) {
  const char* name = "move_slice_blocks";
  check_table(table, blocks, 2, name);
  const int64_t size = element_size;
  DCX_CHECK(size == 1 || size == 2 || size == 4 || size == 8, name,
            "elements of 1, 2, 4 or 8 bytes", size);
  const DeviceGuard guard(table.get_device_index());
  move_slices({table.const_data_ptr<int64_t>(), static_cast<int>(table.size(0)),
               static_cast<int>(table.size(1)), static_cast<int>(blocks), static_cast<int>(size),
               scatter, Cast::kNone},
              current_stream(table));
}

void sgd_slice_blocks(const Tensor& table, int64_t blocks, ScalarType dtype, bool with_momentum,
                      double lr, double momentum, double undamped, double weight_decay,
                      bool nesterov, bool maximize) {
  const char* name = "sgd_slice_blocks";
  check_table(table, blocks, with_momentum ? 4 : 2, name);
  const DeviceGuard guard(table.get_device_index());
  sgd_slices({table_of(table, blocks, dtype, name), static_cast<float>(lr),
              static_cast<float>(momentum), static_cast<float>(undamped),
              static_cast<float>(weight_decay), maximize ? -1.0f : 1.0f, with_momentum, nesterov},
             current_stream(table));
}

void adamw_slice_blocks(const Tensor& table, int64_t blocks, ScalarType dtype, bool amsgrad,
                        double decay, double beta1, double beta2, double eps, bool maximize) {
  const char* name = "adamw_slice_blocks";
  check_table(table, blocks, amsgrad ? 7 : 6, name);
  const DeviceGuard guard(table.get_device_index());
  adamw_slices({table_of(table, blocks, dtype, name), static_cast<float>(decay),
                static_cast<float>(beta1), static_cast<float>(1.0 - beta1),
                static_cast<float>(beta2), static_cast<float>(1.0 - beta2),
                static_cast<float>(eps), maximize ? -1.0f : 1.0f, amsgrad},
               current_stream(table));
}

}  // namespace
}  // namespace dcx

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CUDA, m) {
  m.impl("move_slice_blocks", TORCH_BOX(&dcx::move_slice_blocks));
  m.impl("sgd_slice_blocks", TORCH_BOX(&dcx::sgd_slice_blocks));
  m.impl("adamw_slice_blocks", TORCH_BOX(&dcx::adamw_slice_blocks));
}
