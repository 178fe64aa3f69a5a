#define FASTNN_TABLE fastnn_table_avx512
#include "cpu/isa.inc"
