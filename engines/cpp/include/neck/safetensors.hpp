#pragma once

#include <filesystem>
#include <vector>

#include "neck/tensor.hpp"

namespace neck {

/// Reads a safetensors file: uint8, int32, int64, float16, bfloat16 and float32, in the order of their bytes.
/// \throws Error missing, damaged, or with tensors of another kind.
std::vector<Tensor> read_safetensors(const std::filesystem::path& path);

}  // namespace neck
