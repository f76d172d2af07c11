// The schemas of all native operators. Implementations register themselves: cpu/, cuda/.
// Autograd and fakes are in Python, outside of these operators.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dcx_native, m) {
  // one block a family of operators

  // per-sample convolution: results are given, dw as zeros
  m.def(
      "sample_conv2d_fwd(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, Tensor? in_idx, "
      "Tensor? out_idx, int[] stride, int[] padding, int[] dilation) -> ()");
  // and a whole layer with gates in evaluation: y, winners and g
  m.def(
      "gated_conv2d(Tensor x, Tensor? in_idx, Tensor weight, Tensor phi, Tensor rho, Tensor beta, "
      "Tensor mean, Tensor var, float eps, int k, int[] stride, int[] padding, int[] dilation, "
      "bool relu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sample_conv2d_dgrad(Tensor(a!) dx, Tensor dy, Tensor weight, Tensor? in_idx, "
      "Tensor? out_idx, int[] stride, int[] padding, int[] dilation) -> ()");
  m.def(
      "sample_conv2d_wgrad(Tensor(a!) dw, Tensor dy, Tensor x, Tensor? in_idx, Tensor? out_idx, "
      "int[] stride, int[] padding, int[] dilation) -> ()");

  // slices of many tensors: a line of kernels/slice_table.py each
  m.def("move_slices(Tensor table, int element_size, bool scatter) -> ()");
  m.def(
      "sgd_slices(Tensor table, ScalarType dtype, bool with_momentum, float lr, float momentum, "
      "float undamped, float weight_decay, bool nesterov, bool maximize) -> ()");
  m.def(
      "adamw_slices(Tensor table, ScalarType dtype, bool amsgrad, float decay, float beta1, "
      "float beta2, float eps, bool maximize) -> ()");

  // batch norm (+ ReLU), and the sum over unions of channels
  m.def(
      "batch_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor? active, bool training, float momentum, float eps, "
      "bool relu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_bwd(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd, bool training, bool per_sample) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("union_add(Tensor a, Tensor b, Tensor a_idx, Tensor b_idx, int num_out) -> Tensor");

  // the same on a GPU, where blocks (of 1024 elements) are counted by the host
  m.def("move_slice_blocks(Tensor table, int blocks, int element_size, bool scatter) -> ()");
  m.def(
      "sgd_slice_blocks(Tensor table, int blocks, ScalarType dtype, bool with_momentum, float lr, "
      "float momentum, float undamped, float weight_decay, bool nesterov, bool maximize) -> ()");
  m.def(
      "adamw_slice_blocks(Tensor table, int blocks, ScalarType dtype, bool amsgrad, float decay, "
      "float beta1, float beta2, float eps, bool maximize) -> ()");

  // which channels: of a whole network, and of each sample
  m.def(
      "select_channels(Tensor scores, Tensor bounds, int budget, int min_active) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("k_winners(Tensor g, int k) -> (Tensor, Tensor)");

  // channel convolution by our kernel: results are given; dw is of the active slice
  m.def(
      "channel_conv2d_fwd(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, Tensor? in_idx, "
      "Tensor? out_idx, int[] stride, int[] padding, int[] dilation) -> ()");
  m.def(
      "channel_conv2d_dgrad(Tensor(a!) dx, Tensor dy, Tensor weight, Tensor? in_idx, "
      "Tensor? out_idx, int[] stride, int[] padding, int[] dilation) -> ()");
  m.def(
      "channel_conv2d_wgrad(Tensor(a!) dw, Tensor dy, Tensor x, int[] stride, int[] padding, "
      "int[] dilation) -> ()");

  // channel convolution by torch's library, on the weight packed within the call
  m.def(
      "packed_conv2d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? in_idx, Tensor? out_idx, "
      "int[] stride, int[] padding, int[] dilation, int groups, int active_groups) -> Tensor");
  m.def(
      "packed_conv2d_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? in_idx, Tensor? out_idx, "
      "int[] stride, int[] padding, int[] dilation, int groups, int active_groups, bool need_dx, "
      "bool need_dw) -> (Tensor, Tensor)");
}
