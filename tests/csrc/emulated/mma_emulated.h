// Twins of csrc/cuda/mma.cuh, after the lane layouts of the PTX manual. An asynchronous copy happens
// when it is waited for, not before: who forgets to wait reads the poison.
#pragma once

#include <cstring>
#include <deque>
#include <vector>

namespace dcx {
namespace emulated {

struct AsyncCopy {
  void* to;
  const void* from;  // null: zeros
};

struct AsyncCopies {
  std::vector<AsyncCopy> open;
  std::deque<std::vector<AsyncCopy>> groups;
};

inline AsyncCopies& async_copies() {  // of this thread; a kernel waits for all of its own
  static std::vector<AsyncCopies> all(kMostThreads);
  return all[rank()];
}

struct MatrixRows {
  const unsigned char* row;
  uint32_t* to;
};

inline void load(MatrixRows* const* lanes, bool transposed) {
  for (int lane = 0; lane < 32; ++lane) {
    if (reinterpret_cast<uintptr_t>(lanes[lane]->row) % 16 != 0) fail("ldmatrix: not aligned");
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int half = 0; half < 2; ++half) {
        const int row = transposed ? lane % 4 * 2 + half : lane / 4;
        const int column = transposed ? lane / 4 : lane % 4 * 2 + half;
        std::memcpy(&pair[half], lanes[matrix * 8 + row]->row + column * 2, 2);
      }
      std::memcpy(&lanes[lane]->to[matrix], pair, 4);
    }
  }
}

struct Fragments {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
};

// sum (16 x 8) += a (16 x depth) b (depth x 8); `element` takes element i of a register.
template <int kDepth, typename Element>
void multiply(Fragments* const* lanes, Element element) {
  constexpr int kEach = kDepth / 8;  // elements in a register
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) {
        const int quad = k / kEach % 4, upper = k / (4 * kEach), part = k % kEach;
        const uint32_t a = lanes[row % 8 * 4 + quad]->a[row / 8 + 2 * upper];
        const uint32_t b = lanes[column * 4 + quad]->b[upper];
        sum += element(a, part) * element(b, part);
      }
      lanes[row % 8 * 4 + column / 2]->sum[row / 8 * 2 + column % 2] += sum;
    }
  }
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  if (exponent == 31) value = mantissa == 0 ? INFINITY : NAN;
  return bits >> 15 ? -value : value;
}

inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7fff;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);  // size = m 2^exponent, 0.5 <= m < 1
  const int unit = std::max(exponent - 11, -24);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  return sign | static_cast<uint16_t>(steps + (unit + 24) * 1024);
}

}  // namespace emulated

inline void copy_async_16(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16)) {
    emulated::fail("cp.async: not aligned");
  }
  emulated::async_copies().open.push_back({shared, valid ? global : nullptr});
}

inline void copy_async_commit() {
  emulated::AsyncCopies& mine = emulated::async_copies();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

template <int kPending>
void copy_async_wait() {
  emulated::AsyncCopies& mine = emulated::async_copies();
  for (; mine.groups.size() > kPending; mine.groups.pop_front()) {
    for (const emulated::AsyncCopy& copy : mine.groups.front()) {
      if (copy.from == nullptr) {
        std::memset(copy.to, 0, 16);
      } else {
        std::memcpy(copy.to, copy.from, 16);
      }
    }
  }
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  emulated::MatrixRows mine{static_cast<const unsigned char*>(row), to};
  emulated::warp_collective(
      mine, [](emulated::MatrixRows* const* lanes) { emulated::load(lanes, false); });
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  emulated::MatrixRows mine{static_cast<const unsigned char*>(row), to};
  emulated::warp_collective(
      mine, [](emulated::MatrixRows* const* lanes) { emulated::load(lanes, true); });
}

inline uint16_t to_bits(Bf16, float value) {
  const uint32_t bits = __float_as_uint(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t to_bits(Fp16, float value) { return emulated::float_to_half(value); }
inline uint32_t to_bits(Tf32, float value) { return __float_as_uint(value); }
inline float from_bits(Bf16, uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
inline float from_bits(Fp16, uint16_t bits) { return emulated::half_to_float(bits); }
inline float from_bits(Tf32, uint32_t bits) { return __uint_as_float(bits); }

inline uint32_t round_tf32(uint32_t bits) { return (bits + 0x1000u) & ~0x1fffu; }

template <typename T>
void multiply_add(T, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::Fragments mine{sum, a, {b0, b1}};
  emulated::warp_collective(mine, [](emulated::Fragments* const* lanes) {
    constexpr int kEach = 4 / sizeof(typename T::Bits);
    emulated::multiply<8 * kEach>(lanes, [](uint32_t bits, int part) {
      if constexpr (kEach == 1) {  // tensor cores read no more of an fp32 than TF32 has
        return __uint_as_float(bits & ~0x1fffu);
      } else {
        return from_bits(T(), static_cast<uint16_t>(bits >> 16 * part));
      }
    });
  });
}

}  // namespace dcx
