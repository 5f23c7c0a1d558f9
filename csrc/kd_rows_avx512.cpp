// CPU rows for x86-64 with AVX-512: sixteen lanes.
#if defined(__x86_64__)
// GCC 12 warns of what its own intrinsics leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define KD_ISA avx512
#define KD_LANE_BYTES 64

#include "kd_isa.h"
#include "kd_windows.h"

KD_DEFINE_ROWS(kAvx512Rows)
#endif
