// Statistics of the batch: moments of tiles, then of the batch, and the running ones.
//
// Of float32 they are those of differences from a channel's first number: of a mean that is far
// from 0 differences of means would lose digits. 16-bit numbers have too few for that to matter.

#include "batch_norm_sums.cuh"

namespace dcx::norm {
namespace {

constexpr int kTogether = 4;  // vectors of a thread that are loaded at once

template <typename T>
constexpr bool kPivots = sizeof(T) == 4;

template <int N, typename T>
__device__ __forceinline__ void subtract(Vector<T, N>& values, const float (&pivot)[N]) {
  if constexpr (kPivots<T>) {
#pragma unroll
    for (int i = 0; i < N; ++i) values.at[i] -= pivot[i];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    moments_of_rows_kernel(const T* x, float* partial, Rows rows, int64_t span, int channels) {
  constexpr int N = kVector<T>;
  const Place<N> place(rows, span, channels);
  float pivot[N] = {};
  if constexpr (kPivots<T>) {  // the tensor's first position has all channels
    spread(x, {channels, 1}, column_of({channels, 1}, place.column, 0), pivot);
  }
  Moments<N> own{};
  each_vector<N, kTogether>(
      place.walk,
      [&](auto count, int64_t at) {
        Vector<T, N> values[count.value];
#pragma unroll
        for (int u = 0; u < count.value; ++u) load_vector(x + at + u * place.walk.step, values[u]);
#pragma unroll
        for (int u = 0; u < count.value; ++u) subtract(values[u], pivot);
        own.add(values);
      },
      [](int64_t, int, int) {});
  join(own, place.row, rows.rows, rows.width);
  // the vector that the last row begins only is left to the first thread of its columns
  const int64_t size = place.walk.end - place.walk.begin;
  const int more = static_cast<int>(size % rows.columns) - place.column;
  const T* last = x + place.walk.begin + size / rows.columns * rows.columns + place.column;
  leave_rows<Moments<1>>(rows, place, channels, partial, [&](int i) {
    Moments<1> all = own.at(i);
    if (more < N && i < more) all.merge({1.0f, {to_float(last[i]) - pivot[i]}, {0.0f}});
    return all;
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    moments_of_planes_kernel(const T* x, float* partial, Planes planes, int64_t samples,
                             int64_t channels, int64_t pixels) {
  constexpr int N = kVector<T>;
  const PlanePlace place(planes, samples, pixels);
  Moments<N> own{};
  Moments<1> all{};
  if (place.channel < channels) {
    float pivot[N] = {};
    if constexpr (kPivots<T>) spread(x + place.channel * pixels, {1, N}, {0, 0}, pivot);
    for (int64_t n = place.first; n < place.past; n += planes.together) {
      const Walk walk = place.walk<N>(planes, (n * channels + place.channel) * pixels + place.pixel);
      each_vector<N, kTogether>(
          walk,
          [&](auto count, int64_t at) {
            Vector<T, N> values[count.value];
#pragma unroll
            for (int u = 0; u < count.value; ++u) load_vector(x + at + u * walk.step, values[u]);
#pragma unroll
            for (int u = 0; u < count.value; ++u) subtract(values[u], pivot);
            own.add(values);
          },
          [&](int64_t at, int from, int to) {
            for (int i = from; i < to; ++i) all.merge({1.0f, {to_float(x[at + i]) - pivot[0]}, {0.0f}});
          });
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) all.merge(own.at(i));
  join(all, place.number, place.count, 1);
  if (place.number == 0 && place.channel < channels) {
    all.put(partial + place.tile * Moments<1>::kNumbers * channels + place.channel, channels);
  }
}

__device__ float read(const void* vector, Type type, int64_t i) {
  if (type == Type::kFloat) return static_cast<const float*>(vector)[i];
  if (type == Type::kHalf) return to_float(static_cast<const __half*>(vector)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(vector)[i]);
}

__device__ void write(void* vector, Type type, int64_t i, float value) {
  if (type == Type::kFloat) {
    static_cast<float*>(vector)[i] = value;
  } else if (type == Type::kHalf) {
    static_cast<__half*>(vector)[i] = from_float<__half>(value);
  } else {
    static_cast<__nv_bfloat16*>(vector)[i] = from_float<__nv_bfloat16>(value);
  }
}

struct Statistics {
  const float* partial;
  const float* pivots;  // those of channels are `pivot_step` apart; null: none
  int64_t pivot_step;
  int64_t parts, channels;
  Running running;
  bool training;
  float momentum, eps;
  float* mean;
  float* invstd;
};

__global__ void __launch_bounds__(kThreads) statistics_kernel(Statistics p, Finish finish) {
  const int number = threadIdx.x / finish.items;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * finish.items + threadIdx.x % finish.items;
  const bool exists = c < p.channels;
  Moments<1> all{};
  if (p.training) {
    all = join_parts<Moments<1>>(p.partial + c, p.parts, p.channels, exists, number, finish.lanes,
                                 finish.items);
  }
  if (number != 0 || !exists) return;
  const Running& running = p.running;
  const int64_t place = running.active != nullptr ? running.active[c] : c;
  float mean = all.mean[0] + (p.pivots != nullptr ? p.pivots[c * p.pivot_step] : 0.0f);
  float var = __fdiv_rn(all.m2[0], all.count);
  if (!p.training) {
    mean = read(running.mean, running.type, place);
    var = read(running.var, running.type, place);
  } else if (running.mean != nullptr) {
    const float unbiased = __fdiv_rn(all.m2[0], all.count - 1.0f);  // of one: 0 / 0, as in torch
    const float rest = 1.0f - p.momentum;
    write(running.mean, running.type, place,
          rest * read(running.mean, running.type, place) + p.momentum * mean);
    write(running.var, running.type, place,
          rest * read(running.var, running.type, place) + p.momentum * unbiased);
  }
  p.mean[c] = mean;
  p.invstd[c] = __fdiv_rn(1.0f, __fsqrt_rn(var + p.eps));
}

template <typename T>
void find_moments(const Shape& s, const void* x, float* partial, cudaStream_t stream) {
  const T* from = static_cast<const T*>(x);
  if (s.last) {
    const Rows rows = rows_of(s, false);
    DCX_LAUNCH(moments_of_rows_kernel<T>, dim3(blocks_of(rows)), dim3(rows.width * rows.rows),
               (shared_bytes<Moments, kVector<T>>(rows)), stream, from, partial, rows,
               s.samples * s.pixels, static_cast<int>(s.channels));
    return;
  }
  const Planes planes = planes_of(s, false);
  const int threads = planes.channels * planes.together * planes.lanes;
  DCX_LAUNCH(moments_of_planes_kernel<T>, dim3(blocks_of(planes)), dim3(threads),
             Moments<1>::kNumbers * threads * sizeof(float), stream, from, partial, planes,
             s.samples, s.channels, s.pixels);
}

}  // namespace

void find_statistics(const Forward& args, cudaStream_t stream) {
  const Shape& s = args.shape;
  if (args.training) {
    switch (s.type) {
      case Type::kFloat: find_moments<float>(s, args.x, args.partial, stream); break;
      case Type::kHalf: find_moments<__half>(s, args.x, args.partial, stream); break;
      case Type::kBfloat16: find_moments<__nv_bfloat16>(s, args.x, args.partial, stream); break;
    }
  }
  const int64_t parts = args.training ? parts_of(s, false) : 0;
  const Finish finish = cover_finish(parts, s.channels);
  const int threads = finish.lanes * finish.items;
  const bool pivots = args.training && s.type == Type::kFloat;
  const Statistics statistics{args.partial,
                              pivots ? static_cast<const float*>(args.x) : nullptr,
                              s.last ? 1 : s.pixels, parts, s.channels, args.running, args.training,
                              args.momentum, args.eps, args.mean, args.invstd};
  DCX_LAUNCH(statistics_kernel, dim3(finish.blocks), dim3(threads),
             Moments<1>::kNumbers * threads * sizeof(float), stream, statistics, finish);
}

}  // namespace dcx::norm
