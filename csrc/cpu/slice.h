// Slices of many tensors: the table of kernels/slice_table.py and the walk through what it lists.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "checks.h"

namespace dcx {

// One line of the table. Addresses are those of the first element of a tensor, 0 for none.
enum Column : int64_t {
  FIRST,       // number of the slice's first element among those of all slices
  COUNT,       // elements in the slice
  OUT,         // list of active output channels
  IN,          // list of active input channels
  ROW,         // elements of a packed filter
  INNER,       // elements of an input channel in a filter
  OUTPUTS,     // active output channels per active group
  INPUTS,      // active input channels per active group
  PER_GROUP,   // input channels per group
  STRIDE,      // elements of a full filter
  OWN,         // the operator's columns begin here
};

struct Line {
  const int64_t* columns;

  int64_t operator[](int64_t column) const { return columns[column]; }

  template <class T>
  T* address(int64_t column) const {
    return reinterpret_cast<T*>(columns[column]);
  }
};

struct Lines {
  const int64_t* data;
  int64_t count;
  int64_t columns;

  Line operator[](int64_t number) const { return {data + number * columns}; }

  // of all slices
  int64_t elements() const {
    return count ? (*this)[count - 1][FIRST] + (*this)[count - 1][COUNT] : 0;
  }

  // the line of an element
  int64_t find(int64_t element) const {
    int64_t low = 0, high = count;
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      ((*this)[middle][FIRST] <= element ? low : high) = middle;
    }
    return low;
  }
};

inline Lines lines_of(const Tensor& table, int64_t own, const char* name) {
  using torch::headeronly::ScalarType;
  DCX_CHECK(table.dim() == 2, name, "a table of 2 axes", table.dim());
  int64_t columns = OWN + own;
  DCX_CHECK(table.size(1) == columns, name, std::to_string(columns) + " columns", table.size(1));
  bool numbers = table.scalar_type() == ScalarType::Long && table.is_contiguous();
  DCX_CHECK(numbers, name, "a contiguous table of int64", "another");
  return {static_cast<const int64_t*>(table.const_data_ptr()), table.size(0), table.size(1)};
}

// Pieces that lie in the full tensor at place + source * inner, packed behind each other.
struct Pieces {
  int64_t place;
  int64_t element;
  const int64_t* sources;
  int64_t count;
  int64_t inner;
};

// Gives visit(pieces) what lies in filters first to last of a slice.
template <class Visit>
inline void walk_filters(Line line, int64_t first, int64_t last, Visit& visit) {
  static constexpr int64_t only = 0;
  int64_t row = line[ROW], inner = line[INNER];
  const int64_t* out = line.address<const int64_t>(OUT);
  const int64_t* in = line.address<const int64_t>(IN);
  if (!out && !in) {  // everything: first and last are elements
    visit(Pieces{first, first, &only, 1, last - first});
  } else if (!in) {  // whole filters
    visit(Pieces{0, first * row, out + first, last - first, row});
  } else {
    for (int64_t k = first; k < last; ++k) {
      const int64_t* sources = in + k / line[OUTPUTS] * line[INPUTS];
      int64_t before = sources[0] / line[PER_GROUP] * line[PER_GROUP];  // channels of other groups
      int64_t place = (out ? out[k] : k) * line[STRIDE] - before * inner;
      visit(Pieces{place, k * row, sources, line[INPUTS], inner});
    }
  }
}

// Walks through elements begin to end of all slices; a filter goes where its first element is.
template <class Work>
inline void walk(const Lines& lines, int64_t begin, int64_t end, const Work& work) {
  for (int64_t number = lines.find(begin); number < lines.count; ++number) {
    Line line = lines[number];
    if (line[FIRST] >= end) {
      return;
    }
    int64_t filter = line[OUT] || line[IN] ? line[ROW] : 1;
    int64_t from = std::max<int64_t>(begin - line[FIRST], 0);
    int64_t to = std::min(end - line[FIRST], line[COUNT]);
    int64_t first = (from + filter - 1) / filter, last = (to + filter - 1) / filter;
    if (first < last) {
      auto visit = work.at(line);
      walk_filters(line, first, last, visit);
    }
  }
}

// Gives each(place, element, inner) every piece, with an inner that the compiler knows where it is
// 1 or 9: filters of those sizes are the most frequent, and too short for a loop of unknown length.
template <class Each>
inline void each_piece(const Pieces& pieces, Each each) {
  auto all = [&](int64_t inner) {
    for (int64_t c = 0; c < pieces.count; ++c) {
      each(pieces.place + pieces.sources[c] * inner, pieces.element + c * inner, inner);
    }
  };
  switch (pieces.inner) {
    case 1: return all(1);
    case 9: return all(9);
    default: return all(pieces.inner);
  }
}

}  // namespace dcx
