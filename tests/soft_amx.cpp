// The kernels of dot_amx.cpp with tiles in software, so that machines without AMX test them as well.
#define amx_kernels soft_amx_kernels
#define QN_TILES "tests/soft_tiles.h"
#include "ggml-lite/cpu/dot_amx.cpp"
