#define FASTNN_TABLE fastnn_table_avx512_vnni
#include "cpu/isa.inc"
