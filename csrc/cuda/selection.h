// The global top-k over the channels of all groups: three launches, nothing read by the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dcx {

// Groups stand end to end: group i is bounds[i] to bounds[i + 1].
struct SelectChannels {
  const void* scores;     // (total,) float or double
  const int64_t* bounds;  // (groups + 1,)
  void* keys;             // (total,) of the size of a score: scratch
  int64_t* limit;         // (2,): scratch
  int64_t* indices;       // (total,) active channels of each group, ascending, then -1
  int64_t* inverse;       // (total,) the place in that list, or -1
  int64_t* counts;        // (groups,)
  int total, groups;
  int budget, min_active;
  bool is_double;
};

void select_channels(const SelectChannels& params, cudaStream_t stream);

}  // namespace dcx
