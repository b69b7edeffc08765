#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "neck/tensor.hpp"

namespace neck {

/// Reads numpy's uncompressed .npz: uint8, int32, int64, float16 and float32 arrays in C order; every CRC is checked.
/// \throws Error missing, damaged, compressed, or with arrays of another kind.
std::vector<Tensor> read_npz(const std::filesystem::path& path);

/// What `neck-export verify --save-reference` writes: pictures and what the plain PyTorch module gives for them.
struct Reference {
    Tensor pixels;                ///< uint8 (B, H, W, 3)
    std::vector<Tensor> outputs;  ///< float32, by name
};

/// \throws Error as read_npz, or where `pixels` or the outputs are missing or of another kind.
Reference read_reference(const std::filesystem::path& path);

}  // namespace neck
