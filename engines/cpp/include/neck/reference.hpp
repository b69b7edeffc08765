#pragma once

#include <filesystem>
#include <vector>

#include "neck/export.hpp"
#include "neck/tensor.hpp"

namespace neck {

/// What `neck-export verify --save-reference` writes: images and what the plain PyTorch module gives for them.
struct Reference {
    Tensor pixels;                ///< uint8 (B, H, W, 3)
    std::vector<Tensor> outputs;  ///< float32, by name
};

/// \throws Error as read_safetensors, or where `pixels` or the outputs are missing or of another kind.
NECK_API Reference read_reference(const std::filesystem::path& path);

}  // namespace neck
