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
///
/// A picture of another size is refused: a resize unlike PyTorch's would change the features unnoticed.
/// \return uint8 (1, H, W, 3).
/// \throws Error missing, damaged, no PNG or JPEG, of more than 89478485 pixels, or of another size.
Tensor read_picture(const std::filesystem::path& path, Size wanted);

/// uint8 (B, H, W, 3) to float32 (B, 3, H, W), 0..255 to -1..1; the bits are those of neck/pictures.py.
Tensor normalise(const Tensor& pixels);

/// The size that a model takes: of float32 (B, 3, H, W) or uint8 (B, H, W, 3).
/// \throws Error an input of another kind.
Size picture_size(const Port& input);

/// Pixels as the model takes them: as they are for a uint8 input, else normalised.
Tensor prepare(const Tensor& pixels, const Port& input);

/// The same entries `count` times over along the batch.
Tensor repeat(const Tensor& tensor, std::int64_t count);

}  // namespace neck
