// How the blocks of a launch divide up slices: the host writes the table, the kernels read it.
#pragma once

#include <cstdint>

namespace dcx {

constexpr int kSliceBlock = 1024;  // elements of a packed slice that one block works on

// Columns of a line of the table, int64 each; what a kernel has of its own stands behind.
enum SliceColumn {
  kFirstBlock,   // of the launch: blocks are numbered through all slices
  kNumel,        // of the packed slice
  kOutList,      // address of the active output channels, 0: all
  kInList,       // address of the active input channels, 0: all
  kRow,          // packed elements of an output channel
  kInner,        // elements of a pair of channels
  kOutPerGroup,  // active output channels of an active group
  kInPerGroup,   // active input channels of an active group
  kChannels,     // input channels of a group of the full tensor
  kFullRow,      // elements of an output channel of the full tensor
  kOwn,
};

// One thread moves 16 bytes of a type of so many; variables, as kernels may not call host functions.
template <int kElementSize>
constexpr int kSliceVector = 16 / kElementSize;
template <int kElementSize>
constexpr int kSliceThreads = kSliceBlock / kSliceVector<kElementSize>;

}  // namespace dcx
