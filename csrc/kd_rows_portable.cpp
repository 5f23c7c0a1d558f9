// CPU rows for any processor: four lanes, which every 64-bit one has.
#define KD_ISA portable
#define KD_LANE_BYTES 16

#include "kd_isa.h"
#include "kd_windows.h"

KD_DEFINE_ROWS(kPortableRows)
