// (1) A block a group finds its `min_active` best and lifts their keys above all others. (2) One
// block finds the last channel that the budget reaches: keys stay in the cache, and a network has
// some thousand channels. (3) A block a group writes its list.

#include "cuda/selection.h"

#include "cuda/greatest.cuh"
#include "launch/selection.h"

namespace dcx {
namespace {

constexpr int kGroupThreads = 256;

__device__ __forceinline__ SelectShared& shared_of_block() {
  return *reinterpret_cast<SelectShared*>(shared_memory());
}

template <typename T, typename Key>
__global__ void __launch_bounds__(kGroupThreads)
    select_force_kernel(const T* scores, const int64_t* bounds, Key* keys, int min_active) {
  SelectShared& shared = shared_of_block();
  const int64_t first = bounds[blockIdx.x];
  const int size = static_cast<int>(bounds[blockIdx.x + 1] - first);
  scores += first;
  keys += first;
  const auto key_at = [=](int i) { return order_key(scores[i]); };
  const Greatest<Key> last =
      nth_greatest<Key>(key_at, size, min_active < size ? min_active : size, shared);
  int equals = 0;
  for (int at = 0; at < size; at += kGroupThreads) {
    const int i = at + threadIdx.x;
    const Key key = i < size ? key_at(i) : Key{0};
    const bool equal = i < size && key == last.key;
    const Count tied = count_votes(equal, shared);
    const bool forced = key > last.key || (equal && equals + tied.before < last.ties);
    if (i < size) keys[i] = forced ? static_cast<Key>(~Key{0}) : key;
    equals += tied.all;
  }
}

// limit: the least key that is chosen, and the last channel of those that have it
template <typename Key>
__global__ void __launch_bounds__(kMostSelectThreads)
    select_limit_kernel(const Key* keys, int64_t* limit, int total, int budget) {
  SelectShared& shared = shared_of_block();
  const Greatest<Key> last =
      nth_greatest<Key>([=](int i) { return keys[i]; }, total, budget, shared);
  if (threadIdx.x == 0) {
    limit[0] = static_cast<int64_t>(last.key);
    if (last.ties == 0) limit[1] = -1;
  }
  int equals = 0;
  for (int at = 0; at < total && equals < last.ties; at += blockDim.x) {
    const int i = at + threadIdx.x;
    const bool equal = i < total && keys[i] == last.key;
    const Count tied = count_votes(equal, shared);
    if (equal && equals + tied.before + 1 == last.ties) limit[1] = i;
    equals += tied.all;
  }
}

template <typename Key>
__global__ void __launch_bounds__(kGroupThreads)
    select_list_kernel(const Key* keys, const int64_t* limit, const int64_t* bounds,
                       int64_t* indices, int64_t* inverse, int64_t* counts) {
  SelectShared& shared = shared_of_block();
  const int64_t first = bounds[blockIdx.x];
  const int size = static_cast<int>(bounds[blockIdx.x + 1] - first);
  const Key last = static_cast<Key>(limit[0]);
  const int64_t place = limit[1] - first;  // in this group
  keys += first;
  indices += first;
  inverse += first;
  int count = 0;
  for (int at = 0; at < size; at += kGroupThreads) {
    const int i = at + threadIdx.x;
    const Key key = i < size ? keys[i] : Key{0};
    const bool chosen = i < size && (key > last || (key == last && i <= place));
    const Count before = count_votes(chosen, shared);
    const int nth = count + before.before;
    if (i < size) inverse[i] = chosen ? nth : -1;
    if (chosen) indices[nth] = i;
    count += before.all;
  }
  for (int i = count + threadIdx.x; i < size; i += kGroupThreads) indices[i] = -1;
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

template <typename T>
void select_of(const SelectChannels& p, cudaStream_t stream) {
  using Key = typename KeyOf<T>::Type;
  const T* scores = static_cast<const T*>(p.scores);
  Key* keys = static_cast<Key*>(p.keys);
  const dim3 groups(static_cast<unsigned>(p.groups));
  const dim3 threads(static_cast<unsigned>(select_threads(p.total)));
  const size_t bytes = sizeof(SelectShared);
  DCX_LAUNCH((select_force_kernel<T, Key>), groups, kGroupThreads, bytes, stream, scores, p.bounds,
             keys, p.min_active);
  DCX_LAUNCH(select_limit_kernel<Key>, 1, threads, bytes, stream, keys, p.limit, p.total,
             p.budget);
  DCX_LAUNCH(select_list_kernel<Key>, groups, kGroupThreads, bytes, stream, keys, p.limit,
             p.bounds, p.indices, p.inverse, p.counts);
}

}  // namespace

void select_channels(const SelectChannels& params, cudaStream_t stream) {
  if (params.groups == 0) return;
  if (params.is_double) return select_of<double>(params, stream);
  select_of<float>(params, stream);
}

}  // namespace dcx
