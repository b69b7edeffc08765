#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

#include "neck/export.hpp"
#include "neck/tensor.hpp"

namespace neck {

/// Height and width in pixels.
struct Size {
    std::int64_t height = 0;
    std::int64_t width = 0;
};

/// What an image may cost. A file of a few kilobytes can unpack to gigabytes, or keep a processor busy for minutes.
struct ImageLimits {
    std::int64_t most_pixels = 89'478'485;  ///< Pillow's limit; decoding takes 3 bytes for each, a progressive JPEG 9
    /// How often a progressive JPEG may go over its pixels: usual are 3 to 12. At most_pixels it may do so 12 times, a
    /// smaller image so often that it takes as long, but never more often than this.
    int most_scans = 100;
};

/// Reads a PNG or JPEG file as neck/images.py does: RGB, turned by the orientation in EXIF or XMP, alpha dropped, of 16
/// bits the high byte, CMYK as Pillow converts it.
/// \return uint8 (1, H, W, 3), at its own size.
/// \throws Error missing, damaged, no PNG or JPEG, or beyond the limits.
NECK_API Tensor read_image(const std::filesystem::path& path, const ImageLimits& limits = {});

/// The same for a file that is in memory.
/// \param name for messages.
NECK_API Tensor decode_image(const void* data, std::size_t bytes, const ImageLimits& limits = {},
                               const std::string& name = "the image");

/// The size that a model takes: of float32 (B, 3, H, W) or uint8 (B, H, W, 3).
/// \throws Error an input of another kind.
NECK_API Size image_size(const Port& input);

/// The same entries `count` times over along the batch.
NECK_API Tensor repeat(const Tensor& tensor, std::int64_t count);

}  // namespace neck
