// Batch norm: launch arithmetic, and the kernels emulated.

#include "bindings.h"
#include "cuda/batch_norm.h"

namespace {

using namespace dcx::norm;
using Address = std::uintptr_t;

Shape shape_of(const std::vector<int64_t>& sizes, bool last, int type) {
  return {sizes[0], sizes[1], sizes[2], last, static_cast<Type>(type)};
}

PerChannel per_channel(const std::pair<Address, int>& vector) {
  return {at(vector.first), static_cast<Type>(vector.second)};
}

const Bindings here([](py::module_& m) {
  m.def("norm_cover_rows", [](int64_t sets, int64_t span, int64_t period, int64_t vector,
                              int64_t blocks) {
    const Rows r = cover_rows(sets, span, period, vector, blocks);
    py::dict made;
    made["columns"] = r.columns;
    made["times"] = r.times;
    made["width"] = r.width;
    made["across"] = r.across;
    made["rows"] = r.rows;
    made["block"] = r.block;
    made["tiles"] = r.tiles;
    made["leaves"] = leaves(r);
    made["blocks"] = blocks_of(r);
    return made;
  });
  m.def("norm_cover_planes", [](int64_t samples, int64_t channels, int64_t pixels, int64_t vector,
                                bool per_sample) {
    const Planes p = cover_planes(samples, channels, pixels, vector, per_sample);
    py::dict made;
    made["lanes"] = p.lanes;
    made["together"] = p.together;
    made["channels"] = p.channels;
    made["across"] = p.across;
    made["samples"] = p.samples;
    made["pixels"] = p.pixels;
    made["sample_tiles"] = p.sample_tiles;
    made["pixel_tiles"] = p.pixel_tiles;
    made["blocks"] = blocks_of(p);
    return made;
  });
  m.def("norm_cover_finish", [](int64_t parts, int64_t numbers) {
    const Finish f = cover_finish(parts, numbers);
    return py::make_tuple(f.lanes, f.items, f.blocks);
  });
  m.def("norm_moments_size", [](const std::vector<int64_t>& sizes, bool last, int type) {
    return moments_size(shape_of(sizes, last, type));
  });
  m.def("norm_sums_size", [](const std::vector<int64_t>& sizes, bool last, int type,
                             bool per_sample) {
    return sums_size(shape_of(sizes, last, type), per_sample);
  });
  m.def("norm_fwd", [](const std::vector<int64_t>& sizes, bool last, int type, Address x, Address y,
                       std::pair<Address, int> weight, std::pair<Address, int> bias,
                       Address running_mean, std::pair<Address, int> running_var, Address active,
                       bool training, bool relu, float momentum, float eps, Address mean,
                       Address invstd, Address partial) {
    const Running running{at(running_mean), at(running_var.first),
                          static_cast<Type>(running_var.second), at<const int64_t>(active)};
    const Forward args{shape_of(sizes, last, type), at(x), at(y), per_channel(weight),
                       per_channel(bias), running, training, relu, momentum, eps, at<float>(mean),
                       at<float>(invstd), at<float>(partial)};
    find_statistics(args, nullptr);
    normalise(args, nullptr);
  });
  m.def("norm_bwd", [](const std::vector<int64_t>& sizes, bool last, int type, Address dy,
                       Address x, Address dx, std::pair<Address, int> weight,
                       std::pair<Address, int> bias, Address mean, Address invstd, bool training,
                       bool relu, bool per_sample, Address dweight, Address dbias,
                       Address saliency, Address slopes, Address partial) {
    const Vectors vectors{at<const float>(mean), at<const float>(invstd), per_channel(weight),
                          per_channel(bias)};
    const Backward args{shape_of(sizes, last, type), at(dy), at(x), at(dx), vectors, training,
                        relu, per_sample, at<float>(dweight), at<float>(dbias),
                        at<float>(saliency), at<float>(slopes), at<float>(partial)};
    add_gradients(args, nullptr);
    differentiate(args, nullptr);
  });
});

}  // namespace
