// The sums of a batch norm's gradient: of its weight, its bias, and the saliency, which falls out.
//
// With h the output before the ReLU: sum dh h = weight sum dh xhat + bias sum dh, over any pixels.

#include "batch_norm_sums.cuh"

namespace dcx::norm {
namespace {

constexpr int kTogether = 2;  // vectors of a thread, of either tensor, that are loaded at once

template <typename T>
struct Gradient {
  const T* dy;
  const T* x;
  Vectors vectors;
  bool relu;
  float* partial;
};

template <int N>
__device__ __forceinline__ void add(Sums<N>& own, const Norm<N>& norm, bool relu, int i, float dy,
                                    float x) {
  const float dh = relu && norm(i, x) <= 0.0f ? 0.0f : dy;  // NaN lets it pass
  own.by_x[i] = fmaf(dh, x - norm.center[i], own.by_x[i]);
  own.total[i] += dh;
}

template <int N, typename T>
__device__ __forceinline__ void add_all(Sums<N>& own, const Norm<N>& norm, const Gradient<T>& p,
                                        const Walk& walk) {
  each_vector<N, kTogether>(
      walk,
      [&](auto count, int64_t at) {
        Vector<T, N> dy[count.value], x[count.value];
#pragma unroll
        for (int u = 0; u < count.value; ++u) {
          load_vector(p.dy + at + u * walk.step, dy[u]);
          load_vector(p.x + at + u * walk.step, x[u]);
        }
#pragma unroll
        for (int u = 0; u < count.value; ++u) {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            add(own, norm, p.relu, i, to_float(dy[u].at[i]), to_float(x[u].at[i]));
          }
        }
      },
      [&](int64_t at, int from, int to) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (i < from || i >= to) continue;
          add(own, norm, p.relu, i, to_float(p.dy[at + i]), to_float(p.x[at + i]));
        }
      });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sums_of_rows_kernel(Gradient<T> p, Rows rows, int64_t span, int channels) {
  constexpr int N = kVector<T>;
  const Place<N> place(rows, span, channels);
  const Norm<N> norm(p.vectors, {channels, 1}, column_of({channels, 1}, place.column, place.shift));
  Sums<N> own{};
  add_all(own, norm, p, place.walk);
  join(own, place.row, rows.rows, rows.width);
  leave_rows<Sums<1>>(rows, place, channels, p.partial, [&](int i) { return own.at(i); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sums_of_planes_kernel(Gradient<T> p, Planes planes, int64_t samples, int channels,
                          int64_t pixels) {
  constexpr int N = kVector<T>;
  const PlanePlace place(planes, samples, pixels);
  Sums<N> own{};
  if (place.channel < channels) {
    const Norm<N> norm(p.vectors, {channels, N}, {place.channel, 0});
    for (int64_t n = place.first; n < place.past; n += planes.together) {
      const int64_t plane = n * channels + place.channel;
      add_all(own, norm, p, place.walk<N>(planes, plane * pixels + place.pixel));
    }
  }
  Sums<1> all{};
#pragma unroll
  for (int i = 0; i < N; ++i) all.merge(own.at(i));
  join(all, place.number, place.count, 1);
  if (place.number == 0 && place.channel < channels) {
    all.put(p.partial + place.tile * Sums<1>::kNumbers * channels + place.channel, channels);
  }
}

struct Totals {
  const float* partial;  // [parts][2][channels], or of each sample
  float* sums;           // of samples: [N][2][channels]; null: `partial` has them
  int64_t parts, samples, channels;
  double positions;  // of a channel
  Vectors vectors;
  float* dweight;
  float* dbias;
  float* saliency;
  float* slopes;
};

// weight and bias of a channel
__device__ __forceinline__ void read_affine(const Vectors& vectors, int channel, int channels,
                                            float (&weight)[1], float (&bias)[1]) {
  spread(vectors.weight, 1.0f, {channels, 1}, {channel, 0}, weight);
  spread(vectors.bias, 0.0f, {channels, 1}, {channel, 0}, bias);
}

// The saliency of every sample, and its sums.
__global__ void __launch_bounds__(kThreads) saliency_kernel(Totals p, Finish finish) {
  const int number = threadIdx.x / finish.items, channels = static_cast<int>(p.channels);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * finish.items + threadIdx.x % finish.items;
  const bool exists = item < p.samples * p.channels;
  const int64_t sample = item / p.channels;
  const int c = static_cast<int>(item % p.channels);
  const float* from = p.partial + sample * p.parts * 2 * p.channels + c;
  const Sums<1> all = join_parts<Sums<1>>(from, p.parts, p.channels, exists, number, finish.lanes,
                                          finish.items);
  if (number != 0 || !exists) return;
  float weight[1], bias[1];
  read_affine(p.vectors, c, channels, weight, bias);
  const float along = all.by_x[0] * p.vectors.invstd[c];
  p.saliency[item] = weight[0] * along + bias[0] * all.total[0];
  if (p.sums != nullptr) all.put(p.sums + sample * 2 * p.channels + c, channels);
}

__global__ void __launch_bounds__(kThreads) gradients_kernel(Totals p, Finish finish) {
  const int number = threadIdx.x / finish.items, channels = static_cast<int>(p.channels);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * finish.items + threadIdx.x % finish.items;
  const int c = static_cast<int>(item);
  const Sums<1> all = join_parts<Sums<1>>(p.partial + item, p.parts, p.channels, item < p.channels,
                                          number, finish.lanes, finish.items);
  if (number != 0 || item >= p.channels) return;
  float weight[1], bias[1];
  read_affine(p.vectors, c, channels, weight, bias);
  const float invstd = p.vectors.invstd[c], dweight = all.by_x[0] * invstd, dbias = all.total[0];
  p.dweight[c] = dweight;
  p.dbias[c] = dbias;
  if (p.saliency != nullptr) p.saliency[c] = weight[0] * dweight + bias[0] * dbias;
  const float share = __fdiv_rn(invstd * weight[0], static_cast<float>(p.positions));
  p.slopes[c] = -share * invstd * dweight;
  p.slopes[channels + c] = -share * dbias;
}

template <typename T>
void find_sums(const Backward& args, cudaStream_t stream) {
  const Shape& s = args.shape;
  const int channels = static_cast<int>(s.channels);
  const Gradient<T> gradient{static_cast<const T*>(args.dy), static_cast<const T*>(args.x),
                             args.vectors, args.relu, args.partial};
  if (s.last) {
    const Rows rows = rows_of(s, args.per_sample);
    DCX_LAUNCH(sums_of_rows_kernel<T>, dim3(blocks_of(rows)), dim3(rows.width * rows.rows),
               (shared_bytes<Sums, kVector<T>>(rows)), stream, gradient, rows,
               s.samples * s.pixels / rows.sets, channels);
    return;
  }
  const Planes planes = planes_of(s, args.per_sample);
  const int threads = planes.channels * planes.together * planes.lanes;
  DCX_LAUNCH(sums_of_planes_kernel<T>, dim3(blocks_of(planes)), dim3(threads),
             Sums<1>::kNumbers * threads * sizeof(float), stream, gradient, planes, s.samples,
             channels, s.pixels);
}

}  // namespace

void add_gradients(const Backward& args, cudaStream_t stream) {
  const Shape& s = args.shape;
  switch (s.type) {
    case Type::kFloat: find_sums<float>(args, stream); break;
    case Type::kHalf: find_sums<__half>(args, stream); break;
    case Type::kBfloat16: find_sums<__nv_bfloat16>(args, stream); break;
  }
  Totals totals{args.partial, nullptr, parts_of(s, args.per_sample), s.samples, s.channels,
                static_cast<double>(s.samples * s.pixels), args.vectors, args.dweight, args.dbias,
                args.saliency, args.slopes};
  const auto bytes = [](const Finish& finish) {
    return Sums<1>::kNumbers * finish.lanes * finish.items * sizeof(float);
  };
  if (args.per_sample) {
    if (totals.parts > 1) totals.sums = args.partial + 2 * s.samples * s.channels * totals.parts;
    const Finish finish = cover_finish(totals.parts, s.samples * s.channels);
    DCX_LAUNCH(saliency_kernel, dim3(finish.blocks), dim3(finish.lanes * finish.items),
               bytes(finish), stream, totals, finish);
    if (totals.sums != nullptr) totals.partial = totals.sums;
    totals.parts = s.samples;
    totals.saliency = nullptr;
  }
  const Finish finish = cover_finish(totals.parts, s.channels);
  DCX_LAUNCH(gradients_kernel, dim3(finish.blocks), dim3(finish.lanes * finish.items),
             bytes(finish), stream, totals, finish);
}

}  // namespace dcx::norm
