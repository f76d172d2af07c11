// What goes with the convolutions: index lists the other way round, packed weights.

#include "cuda/channel_conv2d.h"
#include "cuda/launch.cuh"

namespace dcx {

namespace {

constexpr int kThreads = 256;

// a block has one sample
__global__ void invert_lists_kernel(const int64_t* list, int32_t* to, const int64_t active,
                                    const int64_t channels) {
  to += blockIdx.x * channels;
  list += blockIdx.x * active;
  for (int64_t i = threadIdx.x; i < channels; i += kThreads) to[i] = -1;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < active; i += kThreads) to[list[i]] = static_cast<int32_t>(i);
}

// a thread has one element; neighbours are of one row
template <typename Bits>
__global__ void pack_weight_kernel(const PackParams p) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row_length = p.group_c * p.taps;
  if (number >= p.k * row_length) return;
  const int64_t o = number / row_length, rest = number % row_length;
  const int64_t i = rest / p.taps, tap = rest % p.taps;
  const int64_t out = p.out_list != nullptr ? p.out_list[o] : o;
  const int64_t in =
      p.in_list != nullptr ? p.in_list[o / p.group_k * p.group_c + i] % p.full_group_c : i;
  static_cast<Bits*>(p.to)[number] =
      static_cast<const Bits*>(p.from)[(out * p.full_group_c + in) * p.taps + tap];
}

template <typename Bits>
void pack_of(const PackParams& params, void* stream) {
  const int64_t elements = params.k * params.group_c * params.taps;
  const dim3 grid(static_cast<unsigned>(conv::ceil_div(elements, kThreads)));
  DCX_LAUNCH(pack_weight_kernel<Bits>, grid, kThreads, 0, static_cast<cudaStream_t>(stream),
             params);
}

}  // namespace

void invert_lists(const int64_t* list, int32_t* to, int64_t samples, int64_t active,
                  int64_t channels, void* stream) {
  DCX_LAUNCH(invert_lists_kernel, dim3(static_cast<unsigned>(samples)), kThreads, 0,
             static_cast<cudaStream_t>(stream), list, to, active, channels);
}

void pack_weight(const PackParams& params, void* stream) {
  switch (params.element_size) {
    case 2: return pack_of<uint16_t>(params, stream);
    case 4: return pack_of<uint32_t>(params, stream);
    default: return pack_of<uint64_t>(params, stream);
  }
}

}  // namespace dcx
