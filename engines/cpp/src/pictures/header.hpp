#pragma once

#include <cstddef>
#include <string_view>

#include "neck/picture.hpp"

namespace neck {

/// What a picture file says before its pixels are unpacked.
struct Header {
    bool png = false;  ///< else JPEG
    Size size;
    int orientation = 1;        ///< EXIF's, 1 to 8
    std::size_t pixels_at = 0;  ///< where the compressed pixels begin
};

/// Reads the header of a PNG or JPEG file; nothing beyond its end is ever read.
/// \throws PictureFault neither, or without a size.
Header read_header(std::string_view file);

}  // namespace neck
