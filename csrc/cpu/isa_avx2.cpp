#define FASTNN_TABLE fastnn_table_avx2
#include "cpu/isa.inc"
