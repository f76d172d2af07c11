// A block a sample finds the least winner, then lists them all.

#include "cuda/gate.h"

#include "cuda/greatest.cuh"
#include "launch/selection.h"

namespace dcx {
namespace {

template <typename T>
__global__ void __launch_bounds__(kMostSelectThreads) k_winners_kernel(const Winners p) {
  using Key = typename KeyOf<T>::Type;
  SelectShared& shared = *reinterpret_cast<SelectShared*>(shared_memory());
  const int64_t n = blockIdx.x;
  const T* g = static_cast<const T*>(p.g) + n * p.stride_n;
  int64_t* indices = p.indices + n * p.winners;
  T* values = static_cast<T*>(p.values) + n * p.winners;
  const int64_t stride = p.stride_c;
  const Greatest<Key> last = nth_greatest<Key>([=](int i) { return order_key(g[i * stride]); },
                                               p.channels, p.winners, shared);
  int equals = 0, found = 0;
  for (int at = 0; at < p.channels && found < p.winners; at += blockDim.x) {
    const int i = at + threadIdx.x;
    const bool inside = i < p.channels;
    const T value = g[inside ? i * stride : 0];
    const Key key = order_key(value);
    const bool equal = inside && key == last.key;
    const Count tied = count_votes(equal, shared);
    const bool won =
        inside && (key > last.key || (equal && equals + tied.before < last.ties));
    const Count before = count_votes(won, shared);
    if (won) {
      indices[found + before.before] = i;
      values[found + before.before] = value;
    }
    equals += tied.all;
    found += before.all;
  }
}

template <typename T>
void launch_winners(const Winners& p, cudaStream_t stream) {
  DCX_LAUNCH(k_winners_kernel<T>, static_cast<unsigned>(p.samples),
             static_cast<unsigned>(select_threads(p.channels)), sizeof(SelectShared), stream, p);
}

}  // namespace

void k_winners(const Winners& params, GateType type, cudaStream_t stream) {
  if (params.samples == 0 || params.winners == 0) return;
  switch (type) {
    case GateType::kFloat: return launch_winners<float>(params, stream);
    case GateType::kHalf: return launch_winners<__half>(params, stream);
    case GateType::kBfloat16: return launch_winners<__nv_bfloat16>(params, stream);
    case GateType::kDouble: return launch_winners<double>(params, stream);
  }
}

}  // namespace dcx
