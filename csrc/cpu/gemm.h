// A tile of a matrix product, held in registers: the innermost loop of convolutions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace dcx {

// Two vectors of eight floats make a row: 6 x 2 sums, 2 of the right matrix and one value of the
// left one fill the 16 registers of AVX2, and twelve independent sums hide the latency of an FMA.
constexpr int64_t TILE_ROWS = 6;
constexpr int64_t VECTOR_BYTES = 32;
template <typename T>
constexpr int64_t TILE_COLUMNS = 2 * VECTOR_BYTES / sizeof(T);
template <typename T>
constexpr int64_t TILE_SIZE = TILE_ROWS * TILE_COLUMNS<T>;

template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
};

// Sums longer than this are summed in parts: the error of one long chain would be several times
// that of the libraries.
constexpr int64_t CHAIN = 48;

// sums (rows, TILE_COLUMNS) += sum over d of left[row][left_at[d]] * right[right_at[d] + column].
// Left is read where it lies, through pointers to its rows: gathered weights need no copy.
// right_at null: the rows of right follow each other.
template <typename T, int64_t rows, bool listed>
inline void tile_of(T* sums, const T* const* left, const ptrdiff_t* left_at, const T* right,
                    const ptrdiff_t* right_at, int64_t depth) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t half = TILE_COLUMNS<T> / 2;
  const T* row[rows];
  for (int64_t i = 0; i < rows; ++i) row[i] = left[i];
  for (int64_t start = 0; start < depth; start += CHAIN) {
    const int64_t stop = start + CHAIN < depth ? start + CHAIN : depth;
    Vector sum[rows][2] = {};
    for (int64_t d = start; d < stop; ++d) {
      const ptrdiff_t at = left_at[d];
      const T* values = listed ? right + right_at[d] : right + d * TILE_COLUMNS<T>;
      Vector first, second;
      std::memcpy(&first, values, sizeof(Vector));
      std::memcpy(&second, values + half, sizeof(Vector));
#pragma GCC unroll 6
      for (int64_t i = 0; i < rows; ++i) {
        sum[i][0] += row[i][at] * first;
        sum[i][1] += row[i][at] * second;
      }
    }
    // vector by vector: a copy of the whole would go through memory
#pragma GCC unroll 12
    for (int64_t i = 0; i < 2 * rows; ++i) {
      Vector before;
      std::memcpy(&before, sums + i * half, sizeof(Vector));
      before += sum[i / 2][i % 2];
      std::memcpy(sums + i * half, &before, sizeof(Vector));
    }
  }
}

template <typename T, bool listed>
inline void tile(int64_t rows, T* sums, const T* const* left, const ptrdiff_t* left_at,
                 const T* right, const ptrdiff_t* right_at, int64_t depth) {
  switch (rows) {
    case 6: return tile_of<T, 6, listed>(sums, left, left_at, right, right_at, depth);
    case 5: return tile_of<T, 5, listed>(sums, left, left_at, right, right_at, depth);
    case 4: return tile_of<T, 4, listed>(sums, left, left_at, right, right_at, depth);
    case 3: return tile_of<T, 3, listed>(sums, left, left_at, right, right_at, depth);
    case 2: return tile_of<T, 2, listed>(sums, left, left_at, right, right_at, depth);
    default: return tile_of<T, 1, listed>(sums, left, left_at, right, right_at, depth);
  }
}

// Rows are dealt evenly to panels: 32 are 6 6 5 5 5 5, for a panel of two would wait for its sums.
inline int64_t row_panels(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
inline int64_t panel_start(int64_t rows, int64_t panel) {
  const int64_t panels = row_panels(rows), least = rows / panels, longer = rows % panels;
  return panel * least + (panel < longer ? panel : longer);
}

}  // namespace dcx
