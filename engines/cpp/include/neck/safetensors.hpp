#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "neck/export.hpp"
#include "neck/tensor.hpp"

namespace neck {

/// Reads a safetensors file: uint8, int32, int64, float16, bfloat16 and float32, in the order of their bytes.
/// \throws Error missing, damaged, or with tensors of another kind.
NECK_API std::vector<Tensor> read_safetensors(const std::filesystem::path& path);

/// What the file's header says beside its tensors; nothing else is read.
/// \throws Error as read_safetensors.
NECK_API std::map<std::string, std::string> read_safetensors_metadata(const std::filesystem::path& path);

/// Writes a safetensors file; it is there whole or not at all.
/// \throws Error it cannot be written.
NECK_API void write_safetensors(const std::filesystem::path& path, const std::vector<Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace neck
