#include "cpu/batch_norm.h"

#include <algorithm>

namespace dcx::norm {

namespace {

template <class T>
void widen_all(const Tensor& vector, std::vector<double>& values) {
  const T* from = data<T>(vector);
  for (size_t i = 0; i < values.size(); ++i) values[i] = load(from[i]);
}

bool known(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16;
}

}  // namespace

std::vector<double> read(
    const std::optional<Tensor>& vector, int64_t count, double otherwise, const char* name) {
  std::vector<double> values(count, otherwise);
  if (!vector) return values;
  DCX_CHECK(vector->is_cpu() && vector->dim() == 1 && vector->is_contiguous(), name,
            "a contiguous vector on the CPU", "another tensor");
  DCX_CHECK(vector->size(0) == count, name, count, vector->size(0));
  DCX_CHECK(known(vector->scalar_type()), name, "float32, float64 or bfloat16", "another dtype");
  by_type(*vector, [&](auto type) { widen_all<decltype(type)>(*vector, values); });
  return values;
}

void write(const std::vector<double>& values, double* to) {
  std::copy(values.begin(), values.end(), to);
}

void write(const std::vector<double>& values, float* to) {
  std::transform(values.begin(), values.end(), to, [](double v) { return static_cast<float>(v); });
}

void check_input(const Tensor& x, const char* name) {
  DCX_CHECK(x.is_cpu() && known(x.scalar_type()), name, "x of float32, float64 or bfloat16, on a CPU",
            "another tensor");
  DCX_CHECK(x.dim() >= 2 && x.numel() > 0, name, "x (N, k, ...) that is not empty", x.numel());
}

void check_like(const Tensor& t, const Tensor& x, const char* name, const char* what) {
  bool same = t.is_cpu() && t.scalar_type() == x.scalar_type() && t.dim() == x.dim();
  for (int64_t dim = 0; same && dim < x.dim(); ++dim) same = t.size(dim) == x.size(dim);
  DCX_CHECK(same, name, what, "another device, dtype or shape");
}

}  // namespace dcx::norm
