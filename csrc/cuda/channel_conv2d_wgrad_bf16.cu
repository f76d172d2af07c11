#include "cuda/channel_conv2d_wgrad.cuh"

template void dcx::channel_conv2d_wgrad_of<dcx::Bf16>(const ConvWgradParams&, conv::Tile, void*);
