// What every kernel argument is made of. Plain data: no torch, no std:: types cross an
// instruction-set object.
#pragma once
#include <cstdint>

namespace fastnn {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// Boolean masks hold 1 where something takes part.
enum class MaskKind : int32_t { kNone, kBool, kAdditive };

constexpr int64_t element_bytes(DType t) { return t == DType::kFloat32 ? 4 : 2; }

}  // namespace fastnn
