#include "cuda/channel_conv2d.cuh"

template void dcx::channel_conv2d_of<dcx::Bf16>(const ConvParams&, conv::Tile, void*);
