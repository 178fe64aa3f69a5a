#define FASTNN_TABLE fastnn_table_scalar
#include "cpu/isa.inc"
