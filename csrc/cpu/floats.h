// Numbers of every dtype as what they are computed in: 16-bit ones in fp32, converted through their
// bits, so that no version of the library needs instructions or a runtime that another lacks.
#pragma once

#include <cstdint>
#include <cstring>

namespace dcx {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// the type that a dtype is computed in
template <class T>
struct Computed {
  using type = float;
};

template <>
struct Computed<double> {
  using type = double;
};

template <class T>
using computed = typename Computed<T>::type;

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(BFloat16 value) { return from_bits(uint32_t(value.bits) << 16); }

inline float load(Float16 value) {
  uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  uint32_t rest = value.bits & 0x7fff;
  // bias 15 becomes 127; an infinity's or NaN's exponent stays all ones
  uint32_t normal = (rest << 13) + (rest >= 0x7c00 ? 224u << 23 : 112u << 23);
  uint32_t small = to_bits(float(int32_t(rest)) * 0x1p-24f);  // subnormal: a whole number of steps
  return from_bits(sign | (rest < 0x0400 ? small : normal));
}

inline void store(float value, float* to) { *to = value; }
inline void store(double value, double* to) { *to = value; }

// to the nearest, ties to even
inline void store(float value, BFloat16* to) {
  uint32_t bits = to_bits(value);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

inline void store(float value, Float16* to) {
  uint32_t bits = to_bits(value);
  uint32_t sign = bits >> 16 & 0x8000;
  uint32_t rest = bits & 0x7fffffff;
  // 65520 and more carry into the exponent of infinity
  uint32_t normal = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
  // 0.5 has the steps of a subnormal: adding rounds
  uint32_t small = to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f);
  uint32_t large = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
  uint32_t finite = rest < (113u << 23) ? small : normal;
  to->bits = uint16_t(sign | (rest >= (143u << 23) ? large : finite));
}

}  // namespace dcx
