// Operators of batch norm: checks, and tensors unwrapped for the launchers.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "cuda/batch_norm.h"
#include "cuda/stream.h"

namespace dcx::norm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;
using Optional = std::optional<Tensor>;

constexpr const char* kForward = "batch_norm_fwd";
constexpr const char* kBackward = "batch_norm_bwd";
constexpr int64_t kMost = int64_t{1} << 28;  // numbers of a sample: columns are counted in 32 bits

std::optional<Type> known(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::kFloat;
    case ScalarType::Half: return Type::kHalf;
    case ScalarType::BFloat16: return Type::kBfloat16;
    default: return std::nullopt;
  }
}

Type type_of(const Tensor& tensor, const char* name) {
  const std::optional<Type> type = known(tensor);
  DCX_CHECK(type.has_value(), name, "float32, float16 or bfloat16", "another dtype");
  return *type;
}

// Whether channels are innermost, pixels around them, without gaps; a size of 1 may have any stride.
bool channels_last(const Tensor& x) {
  if (x.size(1) != 1 && x.stride(1) != 1) return false;
  int64_t step = x.size(1);
  for (int64_t i = x.dim() - 1; i >= 1; --i) {
    const int64_t dim = i == 1 ? 0 : i;
    if (x.size(dim) != 1 && x.stride(dim) != step) return false;
    step *= x.size(dim);
  }
  return true;
}

void check_place(const Tensor& tensor, const Tensor& like, const char* name) {
  DCX_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
            "tensors on one GPU", "others");
}

Shape shape_of(const Tensor& x, const char* name) {
  check_place(x, x, name);
  DCX_CHECK(x.dim() >= 2 && x.numel() > 0, name, "x (N, k, ...) that is not empty", x.numel());
  const int64_t sample = x.numel() / x.size(0), pixels = sample / x.size(1);
  DCX_CHECK(sample < kMost, name, "samples of fewer than 2^28 numbers", sample);
  const bool last = pixels == 1 || !x.is_contiguous();
  DCX_CHECK(last ? channels_last(x) : true, name, "dense x, channels or pixels innermost",
            "other strides");
  DCX_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, name,
            "x at a multiple of 16 bytes", "another address");
  return {x.size(0), x.size(1), pixels, last, type_of(x, name)};
}

void check_like(const Tensor& t, const Tensor& x, const Shape& shape, const char* name) {
  check_place(t, x, name);
  bool same = t.dim() == x.dim() && t.scalar_type() == x.scalar_type();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = t.size(i) == x.size(i);
  DCX_CHECK(same, name, "tensors of one shape and dtype", "others");
  DCX_CHECK(shape.last ? channels_last(t) : t.is_contiguous(), name, "tensors of one layout",
            "others");
  DCX_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name,
            "tensors at a multiple of 16 bytes", "another address");
}

void check_vector(const Tensor& vector, const Tensor& x, int64_t count, const char* name) {
  check_place(vector, x, name);
  DCX_CHECK(vector.dim() == 1 && vector.is_contiguous(), name, "contiguous vectors", "others");
  DCX_CHECK(vector.size(0) == count, name, count, vector.size(0));
}

PerChannel per_channel(const Optional& vector, const Tensor& x, const char* name) {
  if (!vector) return {nullptr, Type::kFloat};
  check_vector(*vector, x, x.size(1), name);
  return {vector->const_data_ptr(), type_of(*vector, name)};
}

const float* statistic(const Tensor& vector, const Tensor& x, const char* name) {
  check_vector(vector, x, x.size(1), name);
  DCX_CHECK(vector.scalar_type() == ScalarType::Float, name, "float32 statistics", "others");
  return static_cast<const float*>(vector.const_data_ptr());
}

Running running_of(const Optional& mean, const Optional& var, const Optional& active,
                   const Tensor& x) {
  DCX_CHECK(mean.has_value() == var.has_value(), kForward, "both statistics or none", "one");
  Running running{nullptr, nullptr, Type::kFloat, nullptr};
  if (active) {
    check_vector(*active, x, x.size(1), kForward);
    DCX_CHECK(active->scalar_type() == ScalarType::Long, kForward, "active channels as int64",
              "another dtype");
    running.active = static_cast<const int64_t*>(active->const_data_ptr());
  }
  if (!mean) return running;
  const int64_t all = active ? mean->size(0) : x.size(1);
  DCX_CHECK(all >= x.size(1), kForward, "statistics of all channels", all);
  check_vector(*mean, x, all, kForward);
  check_vector(*var, x, all, kForward);
  DCX_CHECK(mean->scalar_type() == var->scalar_type(), kForward, "statistics of one dtype", "two");
  running.mean = mean->mutable_data_ptr();
  running.var = var->mutable_data_ptr();
  running.type = type_of(*mean, kForward);
  return running;
}

Tensor floats(const Tensor& x, int64_t rows, int64_t columns = 0) {
  const int64_t sizes[] = {rows, columns};
  return torch::stable::new_empty(x, {sizes, columns > 0 ? size_t{2} : size_t{1}},
                                  ScalarType::Float);
}

float* pointer(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> fwd(Tensor x, Optional weight, Optional bias,
                                       Optional running_mean, Optional running_var, Optional active,
                                       bool training, double momentum, double eps, bool relu) {
  const Shape shape = shape_of(x, kForward);
  const Running running = running_of(running_mean, running_var, active, x);
  DCX_CHECK(training || running_mean, kForward, "running statistics in evaluation", "none");
  const PerChannel scale = per_channel(weight, x, kForward), shift = per_channel(bias, x, kForward);
  const DeviceGuard guard(x.get_device_index());
  const Tensor y = torch::stable::empty_like(x);
  const Tensor mean = floats(x, shape.channels), invstd = floats(x, shape.channels);
  const Tensor partial = floats(x, training ? moments_size(shape) : 0);
  const Forward args{shape, x.const_data_ptr(), y.mutable_data_ptr(), scale, shift, running,
                     training, relu, static_cast<float>(momentum), static_cast<float>(eps),
                     pointer(mean), pointer(invstd), pointer(partial)};
  const cudaStream_t stream = current_stream(x);
  find_statistics(args, stream);
  normalise(args, stream);
  return {y, mean, invstd};
}

// The output's sign is that of what is computed from x again: y is not read.
std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(Tensor dy, Tensor x, Optional y, Optional weight,
                                               Optional bias, Tensor mean, Tensor invstd,
                                               bool training, bool per_sample) {
  const Shape shape = shape_of(x, kBackward);
  check_like(dy, x, shape, kBackward);
  const Vectors vectors{statistic(mean, x, kBackward), statistic(invstd, x, kBackward),
                        per_channel(weight, x, kBackward), per_channel(bias, x, kBackward)};
  const DeviceGuard guard(x.get_device_index());
  const Tensor dx = torch::stable::empty_like(x);
  const Tensor dweight = floats(x, shape.channels), dbias = floats(x, shape.channels);
  const Tensor saliency =
      per_sample ? floats(x, shape.samples, shape.channels) : floats(x, shape.channels);
  const Tensor slopes = floats(x, 2 * shape.channels);
  const Tensor partial = floats(x, sums_size(shape, per_sample));
  const Backward args{shape, dy.const_data_ptr(), x.const_data_ptr(), dx.mutable_data_ptr(),
                      vectors, training, y.has_value(), per_sample, pointer(dweight),
                      pointer(dbias), pointer(saliency), pointer(slopes), pointer(partial)};
  const cudaStream_t stream = current_stream(x);
  add_gradients(args, stream);
  differentiate(args, stream);
  return {dx, dweight, dbias, saliency};
}

}  // namespace
}  // namespace dcx::norm

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CUDA, m) {
  m.impl("batch_norm_fwd", TORCH_BOX(&dcx::norm::fwd));
  m.impl("batch_norm_bwd", TORCH_BOX(&dcx::norm::bwd));
}
