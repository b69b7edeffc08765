#pragma once

#include <array>
#include <cstddef>
#include <string_view>
#include <vector>

#include "neck/image.hpp"

namespace neck {

/// How the names of files that are read end, in lower case.
inline constexpr std::array<std::string_view, 5> image_suffixes{".png", ".jpg", ".jpeg", ".jpe", ".jfif"};

/// What an image file says before its pixels are unpacked.
struct Header {
    bool png = false;  ///< else JPEG
    Size size;
    int orientation = 1;    ///< EXIF's, 1 to 8
    std::size_t scans = 0;  ///< of a JPEG: how often a decoder goes over its pixels

    // of a PNG
    int depth = 0;  ///< bits of one sample
    int color = 0;  ///< 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGBA
    bool interlaced = false;
    std::string_view palette;
    std::vector<std::string_view> pixels;  ///< compressed
};

/// Reads the header of a PNG or JPEG file as Pillow does; nothing beyond the file's end is ever read.
/// \throws ImageFault neither, damaged, or of a kind that Pillow does not read.
Header read_header(std::string_view file);

}  // namespace neck
