// The active slice of a weight as a list of rows.
#pragma once

#include <cstdint>

namespace dcx {

// Which rows of a full weight (K, C / G, taps) the packed one (k, c / G_act, taps) consists of.
// Packed row (o, i) of active group g = o / group_k is row (out_list[o], in_list[g * group_c + i]).
struct PackParams {
  const void* from;
  void* to;
  const int64_t* out_list;  // null: all
  const int64_t* in_list;   // null: all; channels are numbered through all groups
  int64_t k, group_k, group_c;
  int64_t full_group_c;  // C / G
  int64_t taps, element_size;
};

}  // namespace dcx
