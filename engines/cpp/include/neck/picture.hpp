#pragma once

#include <cstdint>
#include <filesystem>

#include "neck/tensor.hpp"

namespace neck {

/// Height and width in pixels.
struct Size {
    std::int64_t height = 0;
    std::int64_t width = 0;
};

/// Reads a PNG or JPEG file as neck/pictures.py does: RGB, turned as its EXIF orientation says, alpha dropped, of 16
/// bits the high byte, CMYK as Pillow converts it.
/// \return uint8 (1, H, W, 3), at its own size.
/// \throws Error missing, damaged, no PNG or JPEG, or of more than 89478485 pixels.
Tensor read_picture(const std::filesystem::path& path);

/// The size that a model takes: of float32 (B, 3, H, W) or uint8 (B, H, W, 3).
/// \throws Error an input of another kind.
Size picture_size(const Port& input);

/// The same entries `count` times over along the batch.
Tensor repeat(const Tensor& tensor, std::int64_t count);

}  // namespace neck
