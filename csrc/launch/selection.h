// How many threads a block has that looks through numbers for the greatest of them.
#pragma once

#include <cstdint>

namespace dcx {

constexpr int kMostSelectThreads = 1024;

// A power of two, of whole warps: enough for `count` numbers at once where a block may be so large.
inline int select_threads(int64_t count) {
  int threads = 32;
  while (threads < count && threads < kMostSelectThreads) threads *= 2;
  return threads;
}

}  // namespace dcx
