#include "cpu/kernels/attention_bwd.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(Attention, attention) = {
    .attention_key_floats = fastnn::attention_key_floats,
    .attention_value_floats = fastnn::attention_value_floats,
    .attention_prepare = fastnn::attention_prepare,
    .attention_fwd_items = fastnn::attention_fwd_items,
    .attention_fwd_scratch = fastnn::attention_fwd_scratch,
    .attention_fwd = fastnn::attention_fwd,
    .attention_decode_rows = fastnn::attention_decode_rows,
    .attention_decode_floats = fastnn::attention_decode_floats,
    .attention_decode_scratch = fastnn::attention_decode_scratch,
    .attention_decode = fastnn::attention_decode,
    .attention_decode_merge = fastnn::attention_decode_merge,
    .attention_bwd_scratch = fastnn::attention_bwd_scratch,
    .attention_bwd = fastnn::attention_bwd,
};
