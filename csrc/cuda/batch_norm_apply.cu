// The passes that write: y = max((x - mean) scale + shift, 0), and dx.
//
// NHWC and NCHW are rows of columns alike: a thread keeps its columns, so its channels' numbers.

#include "batch_norm_walk.cuh"

namespace dcx::norm {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    normalise_kernel(const T* x, T* y, Vectors vectors, Channels channels, Rows rows, int64_t span,
                     bool relu) {
  constexpr int N = kVector<T>;
  const Place<N> place(rows, span, static_cast<int64_t>(channels.count) * channels.run);
  if (place.walk.at >= place.walk.end) return;
  const Norm<N> norm(vectors, channels, column_of(channels, place.column, 0));
  const auto result = [&](int i, T value) {
    const float h = norm(i, to_float(value));
    return from_float<T>(relu && h < 0.0f ? 0.0f : h);  // NaN stays
  };
  each_vector<N, 4>(
      place.walk,
      [&](auto count, int64_t at) {
        Vector<T, N> values[count.value];
#pragma unroll
        for (int u = 0; u < count.value; ++u) load_vector(x + at + u * place.walk.step, values[u]);
#pragma unroll
        for (int u = 0; u < count.value; ++u) {
#pragma unroll
          for (int i = 0; i < N; ++i) values[u].at[i] = result(i, values[u].at[i]);
          store_vector(y + at + u * place.walk.step, values[u]);
        }
      },
      [&](int64_t at, int from, int to) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (i >= from && i < to) y[at + i] = result(i, x[at + i]);
        }
      });
}

template <typename T>
struct Derivative {
  const T* dy;
  const T* x;
  T* dx;
  Vectors vectors;
  const float* slopes;  // null: statistics are constants
  bool relu;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    differentiate_kernel(Derivative<T> p, Channels channels, Rows rows, int64_t span) {
  constexpr int N = kVector<T>;
  const Place<N> place(rows, span, static_cast<int64_t>(channels.count) * channels.run);
  if (place.walk.at >= place.walk.end) return;
  const Column column = column_of(channels, place.column, 0);
  const Norm<N> norm(p.vectors, channels, column);
  const bool frozen = p.slopes == nullptr;
  float slope[N] = {}, offset[N] = {};
  if (!frozen) {
    spread(p.slopes, channels, column, slope);
    spread(p.slopes + channels.count, channels, column, offset);
  }
  const auto result = [&](int i, T dy, T value) {
    const float x = to_float(value);
    const float dh = p.relu && norm(i, x) <= 0.0f ? 0.0f : to_float(dy);
    const float own = dh * norm.scale[i];
    // not 0 * inf
    return from_float<T>(frozen ? own : own + fmaf(x - norm.center[i], slope[i], offset[i]));
  };
  const bool reads_x = p.relu || !frozen;
  each_vector<N, 2>(
      place.walk,
      [&](auto count, int64_t at) {
        Vector<T, N> dy[count.value], x[count.value] = {};
#pragma unroll
        for (int u = 0; u < count.value; ++u) {
          load_vector(p.dy + at + u * place.walk.step, dy[u]);
          if (reads_x) load_vector(p.x + at + u * place.walk.step, x[u]);
        }
#pragma unroll
        for (int u = 0; u < count.value; ++u) {
#pragma unroll
          for (int i = 0; i < N; ++i) dy[u].at[i] = result(i, dy[u].at[i], x[u].at[i]);
          store_vector(p.dx + at + u * place.walk.step, dy[u]);
        }
      },
      [&](int64_t at, int from, int to) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (i >= from && i < to) p.dx[at + i] = result(i, p.dy[at + i], p.x[at + i]);
        }
      });
}

Channels channels_of(const Shape& s) {
  return {static_cast<int>(s.channels), static_cast<int>(s.last ? 1 : s.pixels)};
}

// NHWC: positions of channels; NCHW: samples of planes.
int64_t span_of(const Shape& s) { return s.last ? s.samples * s.pixels : s.samples; }

Rows cover(const Shape& s) {
  const int64_t period = s.last ? s.channels : s.channels * s.pixels;
  return cover_rows(1, span_of(s), period, vector_of(s.type), kWritingBlocks);
}

template <typename T>
void normalise_as(const Forward& args, cudaStream_t stream) {
  const Shape& s = args.shape;
  const Rows rows = cover(s);
  const Vectors vectors{args.mean, args.invstd, args.weight, args.bias};
  DCX_LAUNCH(normalise_kernel<T>, dim3(blocks_of(rows)), dim3(rows.width * rows.rows), 0, stream,
             static_cast<const T*>(args.x), static_cast<T*>(args.y), vectors, channels_of(s), rows,
             span_of(s), args.relu);
}

template <typename T>
void differentiate_as(const Backward& args, cudaStream_t stream) {
  const Shape& s = args.shape;
  const Rows rows = cover(s);
  const Derivative<T> derivative{static_cast<const T*>(args.dy), static_cast<const T*>(args.x),
                                 static_cast<T*>(args.dx), args.vectors,
                                 args.training ? args.slopes : nullptr, args.relu};
  DCX_LAUNCH(differentiate_kernel<T>, dim3(blocks_of(rows)), dim3(rows.width * rows.rows), 0,
             stream, derivative, channels_of(s), rows, span_of(s));
}

}  // namespace

void normalise(const Forward& args, cudaStream_t stream) {
  switch (args.shape.type) {
    case Type::kFloat: return normalise_as<float>(args, stream);
    case Type::kHalf: return normalise_as<__half>(args, stream);
    case Type::kBfloat16: return normalise_as<__nv_bfloat16>(args, stream);
  }
}

void differentiate(const Backward& args, cudaStream_t stream) {
  switch (args.shape.type) {
    case Type::kFloat: return differentiate_as<float>(args, stream);
    case Type::kHalf: return differentiate_as<__half>(args, stream);
    case Type::kBfloat16: return differentiate_as<__nv_bfloat16>(args, stream);
  }
}

}  // namespace dcx::norm
