// The launchers of channel_conv2d.h by type, and the ordered sum of a weight gradient's splits.

#include "cuda/channel_conv2d.h"

#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace dcx {

namespace {

constexpr int kThreads = 256;

// A thread has one column (tap, C) of one row K of dw; it adds its splits up in order.
template <typename T>
__global__ void channel_conv2d_reduce_kernel(const ConvReduceParams p) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t columns = static_cast<int64_t>(p.taps) * p.C;
  if (number >= p.K * columns) return;
  const int64_t K = number / columns;
  const int tap = static_cast<int>(number % columns / p.C);
  const int C = static_cast<int>(number % columns % p.C);
  float sum = 0;
  for (int64_t n = 0; n < p.splits; ++n) {
    const int64_t row = p.out_at != nullptr ? p.out_at[n * p.K + K] : K;
    const int64_t column = p.in_at != nullptr ? p.in_at[n * p.C + C] : C;
    if (row < 0 || column < 0) continue;
    sum += p.partial[((n * p.k + row) * p.taps + tap) * p.c + column];
  }
  static_cast<typename T::Bits*>(p.dw)[(K * p.C + C) * p.taps + tap] = to_bits(T(), sum);
}

template <typename T>
void reduce_of(const ConvReduceParams& params, void* stream) {
  const int64_t pairs = static_cast<int64_t>(params.K) * params.C * params.taps;
  const dim3 grid(static_cast<unsigned>(conv::ceil_div(pairs, kThreads)));
  DCX_LAUNCH(channel_conv2d_reduce_kernel<T>, grid, kThreads, 0, static_cast<cudaStream_t>(stream),
             params);
}

}  // namespace

void channel_conv2d(const ConvParams& params, ConvType type, conv::Tile tile, void* stream) {
  switch (type) {
    case ConvType::kBf16: return channel_conv2d_of<Bf16>(params, tile, stream);
    case ConvType::kFp16: return channel_conv2d_of<Fp16>(params, tile, stream);
    case ConvType::kTf32: return channel_conv2d_of<Tf32>(params, tile, stream);
  }
}

void channel_conv2d_wgrad(const ConvWgradParams& params, ConvType type, conv::Tile tile,
                          void* stream) {
  switch (type) {
    case ConvType::kBf16: return channel_conv2d_wgrad_of<Bf16>(params, tile, stream);
    case ConvType::kFp16: return channel_conv2d_wgrad_of<Fp16>(params, tile, stream);
    case ConvType::kTf32: return channel_conv2d_wgrad_of<Tf32>(params, tile, stream);
  }
}

void channel_conv2d_reduce(const ConvReduceParams& params, ConvType type, void* stream) {
  switch (type) {
    case ConvType::kBf16: return reduce_of<Bf16>(params, stream);
    case ConvType::kFp16: return reduce_of<Fp16>(params, stream);
    case ConvType::kTf32: return reduce_of<Tf32>(params, stream);
  }
}

}  // namespace dcx
