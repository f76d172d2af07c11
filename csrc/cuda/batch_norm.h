// Batch norm (+ ReLU) whose backward knows the saliency. Plain pointers: no tensors, no allocation.
//
// Legend: N samples, k channels, K channels of the running statistics, P pixels of a sample.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "launch/batch_norm.h"

namespace dcx::norm {

enum class Type { kFloat, kHalf, kBfloat16 };

// x (N, k, P), dense and 16-byte aligned; `last`: in memory (N, P, k).
struct Shape {
  int64_t samples, channels, pixels;
  bool last;
  Type type;
};

struct PerChannel {  // (k,)
  const void* data;  // null: ones for a weight, zeros for a bias
  Type type;
};

// h = (x - mean) invstd weight + bias, (k,) each
struct Vectors {
  const float* mean;
  const float* invstd;
  PerChannel weight, bias;
};

struct Running {
  void* mean;  // (K,), null: none
  void* var;
  Type type;
  const int64_t* active;  // (k,), null: all
};

struct Forward {
  Shape shape;
  const void* x;
  void* y;
  PerChannel weight, bias;
  Running running;
  bool training, relu;
  float momentum, eps;
  float* mean;  // of the batch or, in evaluation, the running one; with invstd: results
  float* invstd;
  float* partial;  // of `moments_size`
};

struct Backward {
  Shape shape;
  const void* dy;
  const void* x;
  void* dx;
  Vectors vectors;
  bool training, relu, per_sample;
  float* dweight;
  float* dbias;
  float* saliency;  // (k,), or (N, k)
  float* slopes;    // (2, k): what dx needs of the sums
  float* partial;   // of `sums_size`
};

inline int64_t vector_of(Type type) { return type == Type::kFloat ? 4 : 8; }

inline Rows rows_of(const Shape& s, bool per_sample) {
  const int64_t sets = per_sample ? s.samples : 1, all = s.samples * s.pixels;
  return cover_rows(sets, all / sets, s.channels, vector_of(s.type), kReducingBlocks);
}

inline Planes planes_of(const Shape& s, bool per_sample) {
  return cover_planes(s.samples, s.channels, s.pixels, vector_of(s.type), per_sample);
}

// Partial results of a channel: of all samples or, `per_sample`, of one.
inline int64_t parts_of(const Shape& s, bool per_sample) {
  if (s.last) {
    const Rows rows = rows_of(s, per_sample);
    return rows.tiles * leaves(rows);
  }
  const Planes planes = planes_of(s, per_sample);
  return planes.pixel_tiles * (per_sample ? 1 : planes.sample_tiles);
}

// Floats of scratch memory.
inline int64_t moments_size(const Shape& s) { return 3 * s.channels * parts_of(s, false); }
inline int64_t sums_size(const Shape& s, bool per_sample) {
  const int64_t parts = parts_of(s, per_sample);
  if (!per_sample) return 2 * s.channels * parts;
  return 2 * s.samples * s.channels * (parts > 1 ? parts + 1 : 1);
}

void find_statistics(const Forward& args, cudaStream_t stream);
void normalise(const Forward& args, cudaStream_t stream);
void add_gradients(const Backward& args, cudaStream_t stream);
void differentiate(const Backward& args, cudaStream_t stream);

}  // namespace dcx::norm
