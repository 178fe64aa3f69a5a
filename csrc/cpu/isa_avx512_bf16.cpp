#define FASTNN_TABLE fastnn_table_avx512_bf16
#include "cpu/isa.inc"
