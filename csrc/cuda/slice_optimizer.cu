// Arithmetic is fp32, in the order of torch's fused kernels. Only the gradient is packed: parameter
// and state are read and written in place, the rest of them is never touched.

#include "slice_optimizer.h"

#include "launch.cuh"
#include "slice_walk.cuh"

namespace dcx {
namespace {

// Switches are run-time arguments: memory is what takes the time, and instances take the compiler's.
template <typename T>
__global__ void __launch_bounds__(kSliceThreads<sizeof(T)>) sgd_kernel(SgdSlices step) {
  constexpr int N = kSliceVector<sizeof(T)>;
  const int64_t* line = find_slice(step.table.lines, step.table.count, step.table.columns);
  const Places<N> places = find_places<N>(line);
  T* param_at = global<T>(line[kOwn]);
  Vector<T, N> param{}, grad{}, buffer{};
  load_full(param_at, places, param);
  load_packed(global<const T>(line[kOwn + 1]), places, grad);
  T* buffer_at = nullptr;
  bool fresh = false;
  if (step.has_momentum) {
    buffer_at = global<T>(line[kOwn + 2]);
    fresh = line[kOwn + 3] != 0;
    if (!fresh) load_full(buffer_at, places, buffer);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float old = to_float(param.at[i]);
    float change = to_float(grad.at[i]) * step.sign;
    if (step.weight_decay != 0.0f) change += step.weight_decay * old;  // not 0 * inf
    if (step.has_momentum) {
      const float moved = step.momentum * to_float(buffer.at[i]) + step.undamped * change;
      const float now = fresh ? change : moved;  // torch seeds it with the undamped gradient
      buffer.at[i] = from_float<T>(now);
      change = step.nesterov ? change + step.momentum * now : now;
    }
    param.at[i] = from_float<T>(old - step.lr * change);
  }
  if (step.has_momentum) store_full(buffer_at, places, buffer);
  store_full(param_at, places, param);
}

template <typename T>
__global__ void __launch_bounds__(kSliceThreads<sizeof(T)>) adamw_kernel(AdamwSlices step) {
  constexpr int N = kSliceVector<sizeof(T)>;
  const int64_t* line = find_slice(step.table.lines, step.table.count, step.table.columns);
  const Places<N> places = find_places<N>(line);
  T* param_at = global<T>(line[kOwn]);
  T* first_at = global<T>(line[kOwn + 2]);
  T* second_at = global<T>(line[kOwn + 3]);
  T* largest_at = nullptr;
  // step counts differ: of layers that join later
  const float step_size = static_cast<float>(__longlong_as_double(line[kOwn + 4]));
  const float correction = static_cast<float>(__longlong_as_double(line[kOwn + 5]));
  Vector<T, N> param{}, grad{}, first{}, second{}, largest{};
  load_full(param_at, places, param);
  load_packed(global<const T>(line[kOwn + 1]), places, grad);
  load_full(first_at, places, first);
  load_full(second_at, places, second);
  if (step.amsgrad) {
    largest_at = global<T>(line[kOwn + 6]);
    load_full(largest_at, places, largest);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float slope = to_float(grad.at[i]) * step.sign;
    float value = to_float(param.at[i]);
    if (step.decay != 0.0f) value -= step.decay * value;  // not 0 * inf
    const float mean = step.beta1 * to_float(first.at[i]) + step.rest1 * slope;
    float square = step.beta2 * to_float(second.at[i]) + step.rest2 * (slope * slope);
    first.at[i] = from_float<T>(mean);
    second.at[i] = from_float<T>(square);
    if (step.amsgrad) {
      const float before = to_float(largest.at[i]);
      square = before > square ? before : square;  // a NaN of this step stays one
      largest.at[i] = from_float<T>(square);
    }
    const float denominator = __fdiv_rn(__fsqrt_rn(square), correction) + step.eps;
    param.at[i] = from_float<T>(value - __fdiv_rn(step_size * mean, denominator));
  }
  store_full(first_at, places, first);
  store_full(second_at, places, second);
  if (step.amsgrad) store_full(largest_at, places, largest);
  store_full(param_at, places, param);
}

}  // namespace

void sgd_slices(const SgdSlices& step, cudaStream_t stream) {
  if (step.table.blocks == 0) return;
  const dim3 blocks(step.table.blocks);
  switch (step.table.dtype) {
    case Float::kFloat:
      DCX_LAUNCH(sgd_kernel<float>, blocks, dim3(kSliceThreads<4>), 0, stream, step);
      break;
    case Float::kHalf:
      DCX_LAUNCH(sgd_kernel<__half>, blocks, dim3(kSliceThreads<2>), 0, stream, step);
      break;
    case Float::kBfloat16:
      DCX_LAUNCH(sgd_kernel<__nv_bfloat16>, blocks, dim3(kSliceThreads<2>), 0, stream, step);
      break;
  }
}

void adamw_slices(const AdamwSlices& step, cudaStream_t stream) {
  if (step.table.blocks == 0) return;
  const dim3 blocks(step.table.blocks);
  switch (step.table.dtype) {
    case Float::kFloat:
      DCX_LAUNCH(adamw_kernel<float>, blocks, dim3(kSliceThreads<4>), 0, stream, step);
      break;
    case Float::kHalf:
      DCX_LAUNCH(adamw_kernel<__half>, blocks, dim3(kSliceThreads<2>), 0, stream, step);
      break;
    case Float::kBfloat16:
      DCX_LAUNCH(adamw_kernel<__nv_bfloat16>, blocks, dim3(kSliceThreads<2>), 0, stream, step);
      break;
  }
}

}  // namespace dcx
