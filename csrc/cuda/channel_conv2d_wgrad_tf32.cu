#include "cuda/channel_conv2d_wgrad.cuh"

template void dcx::channel_conv2d_wgrad_of<dcx::Tf32>(const ConvWgradParams&, conv::Tile, void*);
