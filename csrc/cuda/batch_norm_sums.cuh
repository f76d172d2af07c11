// What batch norm adds up, and how threads and blocks join their results: in a fixed order, so that
// reruns are bit-equal.
#pragma once

#include "batch_norm_walk.cuh"

namespace dcx::norm {

// Mean and sum of squared differences from it, of N columns (Chan et al., 1979).
template <int N>
struct Moments {
  static constexpr int kNumbers = 1 + 2 * N;
  float count, mean[N], m2[N];

  __device__ __forceinline__ Moments<1> at(int i) const { return {count, {mean[i]}, {m2[i]}}; }

  __device__ __forceinline__ void put(float* to, int stride) const {
    to[0] = count;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to[(1 + i) * stride] = mean[i];
      to[(1 + N + i) * stride] = m2[i];
    }
  }

  static __device__ __forceinline__ Moments get(const float* from, int stride) {
    Moments found;
    found.count = from[0];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      found.mean[i] = from[(1 + i) * stride];
      found.m2[i] = from[(1 + N + i) * stride];
    }
    return found;
  }

  __device__ __forceinline__ void merge(const Moments& other) {
    const float both = count + other.count;
    const float share = both > 0.0f ? __fdiv_rn(other.count, both) : 0.0f;
    const float weight = count * share;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float delta = other.mean[i] - mean[i];
      mean[i] = fmaf(delta, share, mean[i]);
      m2[i] += fmaf(delta * weight, delta, other.m2[i]);
    }
    count = both;
  }

  // Merge U rows: the moments of a few numbers, then one division for all columns.
  template <int U, typename T>
  __device__ __forceinline__ void add(const Vector<T, N> (&rows)[U]) {
    Moments some;
    some.count = U;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int u = 0; u < U; ++u) sum += to_float(rows[u].at[i]);
      some.mean[i] = sum * (1.0f / U);
      some.m2[i] = 0.0f;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const float off = to_float(rows[u].at[i]) - some.mean[i];
        some.m2[i] = fmaf(off, off, some.m2[i]);
      }
    }
    merge(some);
  }
};

// Sums of dh (x - mean) and of dh, of N columns.
template <int N>
struct Sums {
  static constexpr int kNumbers = 2 * N;
  float by_x[N], total[N];

  __device__ __forceinline__ Sums<1> at(int i) const { return {{by_x[i]}, {total[i]}}; }

  __device__ __forceinline__ void put(float* to, int stride) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to[i * stride] = by_x[i];
      to[(N + i) * stride] = total[i];
    }
  }

  static __device__ __forceinline__ Sums get(const float* from, int stride) {
    Sums found;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      found.by_x[i] = from[i * stride];
      found.total[i] = from[(N + i) * stride];
    }
    return found;
  }

  __device__ __forceinline__ void merge(const Sums& other) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      by_x[i] += other.by_x[i];
      total[i] += other.total[i];
    }
  }
};

// Merge what `count` threads have, `stride` threads apart, into the first; this one is `number`.
template <typename State>
__device__ __forceinline__ void join(State& own, int number, int count, int stride) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int threads = blockDim.x;
  int half = 1;
  while (half < count) half *= 2;
  for (half /= 2; half > 0; half /= 2) {
    __syncthreads();
    if (number >= half && number < 2 * half) own.put(shared + threadIdx.x, threads);
    __syncthreads();
    if (number < half && number + half < count) {
      own.merge(State::get(shared + threadIdx.x + half * stride, threads));
    }
  }
}

// Merge partial results [parts][numbers][channels] of a channel into the first lane; `number`: this
// lane among `lanes`, which are `stride` threads apart.
template <typename State>
__device__ __forceinline__ State join_parts(const float* partial, int64_t parts, int64_t channels,
                                            bool exists, int number, int lanes, int stride) {
  State own{};
  if (exists) {
#pragma unroll 4
    for (int64_t part = number; part < parts; part += lanes) {
      own.merge(State::get(partial + part * State::kNumbers * channels, channels));
    }
  }
  join(own, number, lanes, stride);
  return own;
}

// Leave the results of a block's columns, which its first threads have: `state_of(i)` of column i.
// A block with whole rows adds up the columns of each channel.
template <typename One, int N, typename StateOf>
__device__ __forceinline__ void leave_rows(const Rows& rows, const Place<N>& place, int channels,
                                           float* partial, StateOf state_of) {
  if (rows.across > 1) {
    if (place.row != 0 || !place.exists) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int column = place.column + i;
      const int channel = column_of({channels, 1}, column, place.shift).channel;
      const int64_t part = place.tile * rows.times + column / channels;
      state_of(i).put(partial + part * One::kNumbers * channels + channel, channels);
    }
    return;
  }
  float* shared = reinterpret_cast<float*>(shared_memory());
  __syncthreads();
  if (place.row == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) state_of(i).put(shared + place.column + i, rows.columns);
  }
  __syncthreads();
  for (int channel = threadIdx.x; channel < channels; channel += blockDim.x) {
    int column = (channel + place.shift) % channels;
    One all = One::get(shared + column, rows.columns);
    for (int time = 1; time < rows.times; ++time) {
      column += channels;
      all.merge(One::get(shared + column, rows.columns));
    }
    all.put(partial + place.tile * One::kNumbers * channels + channel, channels);
  }
}

// What a thread has of planes: some pixels of every `together`-th sample of one channel.
struct PlanePlace {
  int64_t tile, first, past;  // samples
  int64_t pixel, pixels;
  int channel, lane;
  int number, count;  // this thread among those of its channel

  __device__ PlanePlace(const Planes& planes, int64_t samples, int64_t all_pixels) {
    tile = blockIdx.x / planes.across;
    const int64_t turn = tile / planes.pixel_tiles * planes.samples;
    past = turn + planes.samples < samples ? turn + planes.samples : samples;
    pixel = tile % planes.pixel_tiles * planes.pixels;
    pixels = all_pixels - pixel < planes.pixels ? all_pixels - pixel : planes.pixels;
    count = planes.lanes * planes.together;
    number = threadIdx.x % count;
    lane = number % planes.lanes;
    first = turn + number / planes.lanes;
    channel = blockIdx.x % planes.across * planes.channels + threadIdx.x / count;
  }

  template <int N>
  __device__ __forceinline__ Walk walk(const Planes& planes, int64_t begin) const {
    return {begin - begin % N + lane * N, static_cast<int64_t>(planes.lanes) * N, begin,
            begin + pixels};
  }
};

// Shared memory of the kernels that add up.
template <template <int> class State, int N>
size_t shared_bytes(const Rows& rows) {
  const int threads = rows.width * rows.rows;
  const int joined = State<N>::kNumbers * threads;
  const int left = rows.across > 1 ? 0 : State<1>::kNumbers * rows.columns;
  return std::max(joined, left) * sizeof(float);
}

}  // namespace dcx::norm
