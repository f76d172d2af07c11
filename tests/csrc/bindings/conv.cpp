// Convolutions: launch arithmetic, and the kernels emulated.

#include "bindings.h"
#include "cuda/conv_params.h"

namespace {

using namespace dcx;
using Sizes = std::vector<int64_t>;


ConvImage image(const py::tuple& from) {
  ConvImage made{at(from[0].cast<std::uintptr_t>()), {}, {}};
  const auto size = from[1].cast<Sizes>(), stride = from[2].cast<Sizes>();
  std::copy_n(size.begin(), 4, made.size);
  std::copy_n(stride.begin(), 4, made.stride);
  return made;
}

ConvWindow window(const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  ConvWindow made{};
  std::copy_n(stride.begin(), 2, made.stride);
  std::copy_n(padding.begin(), 2, made.padding);
  std::copy_n(dilation.begin(), 2, made.dilation);
  return made;
}

ConvWeight weight(const py::tuple& from, std::uintptr_t bias, std::uintptr_t in_list,
                  std::uintptr_t out_list, bool per_sample) {
  ConvWeight made{at(from[0].cast<std::uintptr_t>()), at(bias), {}, at<const int64_t>(out_list),
                  at<const int64_t>(in_list), per_sample};
  const auto size = from[1].cast<Sizes>();
  std::copy_n(size.begin(), 4, made.size);
  return made;
}

py::dict as_dict(const conv::Axis& a) {
  py::dict made;
  made["size"] = a.size;
  made["out_step"] = a.out_step;
  made["out_first"] = a.out_first;
  made["src_size"] = a.src_size;
  made["src_step"] = a.src_step;
  made["src_first"] = a.src_first;
  made["taps"] = a.taps;
  made["tap_move"] = a.tap_move;
  made["tap_first"] = a.tap_first;
  made["tap_step"] = a.tap_step;
  return made;
}

const Bindings here([](py::module_& m) {
  m.def("conv_output_pixels", [](int64_t size, int64_t taps, int64_t stride, int64_t padding,
                                 int64_t dilation) {
    return conv::output_pixels({size, taps, stride, padding, dilation});
  });
  m.def("conv_fwd_axis", [](int64_t size, int64_t taps, int64_t stride, int64_t padding,
                            int64_t dilation) {
    return as_dict(conv::fwd_axis({size, taps, stride, padding, dilation}));
  });
  m.def("conv_dgrad_axes", [](int64_t size, int64_t taps, int64_t stride, int64_t padding,
                              int64_t dilation) {
    py::list made;
    for (const conv::Axis& axis : conv::dgrad_axes({size, taps, stride, padding, dilation})) {
      made.append(as_dict(axis));
    }
    return made;
  });
  m.def("conv_choose_tile", [](int64_t problems, int64_t rows, int64_t columns, int64_t on) {
    return static_cast<int>(conv::choose_tile(problems, rows, columns, on));
  });
  m.def("conv_choose_splits", [](int64_t pixels, int64_t rows, int64_t columns, int64_t on) {
    const conv::Splits made = conv::choose_splits(pixels, rows, columns, on);
    return py::make_tuple(static_cast<int>(made.tile), made.splits, made.pixels);
  });
  m.def("conv_fwd", [](const py::tuple& x, const py::tuple& y, const py::tuple& w,
                       std::uintptr_t bias, std::uintptr_t in_list, std::uintptr_t out_list,
                       bool per_sample, const Sizes& stride, const Sizes& padding,
                       const Sizes& dilation, int type, int tile) {
    const ConvParams p =
        conv_fwd_params(image(x), image(y), weight(w, bias, in_list, out_list, per_sample),
                        window(stride, padding, dilation));
    channel_conv2d(p, static_cast<ConvType>(type), static_cast<conv::Tile>(tile), nullptr);
  });
  m.def("conv_dgrad", [](const py::tuple& dy, const py::tuple& dx, const py::tuple& w,
                         std::uintptr_t in_list, std::uintptr_t out_list, bool per_sample,
                         const Sizes& stride, const Sizes& padding, const Sizes& dilation, int type,
                         int tile) {
    const ConvImage into = image(dx);
    const auto launches =
        conv_dgrad_params(image(dy), into, weight(w, 0, in_list, out_list, per_sample),
                          window(stride, padding, dilation));
    for (const ConvParams& p : launches) {
      channel_conv2d(p, static_cast<ConvType>(type), static_cast<conv::Tile>(tile), nullptr);
    }
    return conv_dgrad_covers(into, launches);
  });
  m.def("conv_wgrad", [](const py::tuple& dy, const py::tuple& x, std::uintptr_t partial,
                         const Sizes& taps, const Sizes& stride, const Sizes& padding,
                         const Sizes& dilation, int64_t splits, int64_t pixels, int type,
                         int tile) {
    ConvWgradParams p =
        conv_wgrad_params(image(dy), image(x), taps.data(), window(stride, padding, dilation));
    p.partial = at<float>(partial);
    p.splits = static_cast<int32_t>(splits);
    p.pixels_per_split = pixels;
    channel_conv2d_wgrad(p, static_cast<ConvType>(type), static_cast<conv::Tile>(tile), nullptr);
  });
  m.def("conv_reduce", [](std::uintptr_t partial, std::uintptr_t dw, std::uintptr_t out_at,
                          std::uintptr_t in_at, int64_t splits, int K, int C, int k, int c,
                          int taps, int type) {
    const ConvReduceParams p{at<const float>(partial), at(dw), at<const int32_t>(out_at),
                             at<const int32_t>(in_at), splits, K, C, k, c, taps};
    channel_conv2d_reduce(p, static_cast<ConvType>(type), nullptr);
  });
  m.def("conv_invert_lists", [](std::uintptr_t list, std::uintptr_t to, int64_t samples,
                                int64_t active, int64_t channels) {
    invert_lists(at<const int64_t>(list), at<int32_t>(to), samples, active, channels, nullptr);
  });
  m.def("conv_pack", [](std::uintptr_t from, std::uintptr_t to, std::uintptr_t out_list,
                        std::uintptr_t in_list, int64_t k, int64_t group_k, int64_t group_c,
                        int64_t full_group_c, int64_t taps, int64_t element_size) {
    pack_weight({at(from), at(to), at<const int64_t>(out_list), at<const int64_t>(in_list), k,
                 group_k, group_c, full_group_c, taps, element_size},
                nullptr);
  });
});

}  // namespace
