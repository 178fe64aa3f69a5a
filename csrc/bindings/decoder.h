// fastnn._C.Decoder and DecoderProduct.
#pragma once
#include <pybind11/pybind11.h>

namespace fastnn {

void add_decoder(pybind11::module_& m);

}  // namespace fastnn
