// CPU rows for x86-64 with AVX2: eight lanes.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define KD_ISA avx2
#define KD_LANE_BYTES 32

#include "kd_isa.h"
#include "kd_windows.h"

KD_DEFINE_ROWS(kAvx2Rows)
#endif
