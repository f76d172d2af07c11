// Moves of slices of many tensors at once: bits, whatever they mean.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "checks.h"
#include "cpu/slice.h"
#include "cpu/vectors.h"

namespace dcx {
namespace {

constexpr int64_t GRAIN = 1 << 14;  // elements that are worth a thread

enum Own : int64_t { FULL = OWN, PACKED, OWN_END };

template <class T, bool SCATTER>
struct Move {
  T* full;
  T* packed;

  Move at(Line line) const { return {line.address<T>(FULL), line.address<T>(PACKED)}; }

  void operator()(const Pieces& pieces) const {
    each_piece(pieces, [this](int64_t place, int64_t element, int64_t inner) {
      if (SCATTER) {
        std::memcpy(full + place, packed + element, inner * sizeof(T));
      } else {
        std::memcpy(packed + element, full + place, inner * sizeof(T));
      }
    });
  }
};

template <class T, bool SCATTER>
DCX_MULTIVERSION void move(const Lines& lines, int64_t begin, int64_t end) {
  Move<T, SCATTER> work{};
  walk(lines, begin, end, work);
}

template <class T>
void move_all(const Lines& lines, bool scatter) {
  torch::stable::parallel_for(0, lines.elements(), GRAIN, [&](int64_t begin, int64_t end) {
    scatter ? move<T, true>(lines, begin, end) : move<T, false>(lines, begin, end);
  });
}

void move_slices(const Tensor& table, int64_t size, bool scatter) {
  Lines lines = lines_of(table, OWN_END - OWN, "move_slices");
  switch (size) {
    case 1: return move_all<uint8_t>(lines, scatter);
    case 2: return move_all<uint16_t>(lines, scatter);
    case 4: return move_all<uint32_t>(lines, scatter);
    case 8: return move_all<uint64_t>(lines, scatter);
    default: DCX_CHECK(false, "move_slices", "elements of 1, 2, 4 or 8 bytes", size);
  }
}

}  // namespace
}  // namespace dcx

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CPU, m) {
  m.impl("move_slices", TORCH_BOX(&dcx::move_slices));
}
