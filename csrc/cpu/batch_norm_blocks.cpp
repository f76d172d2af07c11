#include "cpu/batch_norm_blocks.h"

namespace dcx::norm {

namespace {

int64_t power_of_two_below(int64_t most) {
  int64_t power = 1;
  while (2 * power <= most) power *= 2;
  return power;
}

// The largest divisor of `rows` with which joined rows are no longer than a tile.
int64_t joined_rows(int64_t rows, int64_t channels) {
  for (int64_t most = TILE / channels; most > 1; --most) {
    if (rows % most == 0) return most;
  }
  return 1;
}

}  // namespace

Blocks::Blocks(Sizes sizes, bool last, bool joined, bool by_sample)
    : sizes_(sizes), last_(last), planes_(!last && sizes.pixels >= PLANE), group_(1), slices_(1) {
  const int64_t own = last ? sizes.pixels : 1;  // rows of a sample
  if (last && joined) group_ = joined_rows(by_sample ? own : sizes.samples * own, sizes.channels);
  run_ = last ? 1 : planes_ ? LANES : sizes.pixels;
  columns_ = group_ * sizes.channels * run_;
  outer_ = sizes.samples * own / group_;
  // sizes alone decide, never the number of threads: results depend on the sizes only
  const int64_t entries = sizes.samples * sizes.channels * sizes.pixels;
  const int64_t tasks = std::clamp<int64_t>(entries / CHUNK, 1, 64);
  const int64_t least = planes_ ? 1 : 8;  // fewer rows are not worth columns of sums
  parts_ = by_sample ? sizes.samples : power_of_two_below(std::min(tasks, outer_ / least));
  if (group_ == 1 && parts_ < tasks) {
    slices_ = power_of_two_below(std::min(tasks / parts_, sizes.channels));
  }
}

}  // namespace dcx::norm
