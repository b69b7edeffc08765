#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "neck/image.hpp"
#include "images/header.hpp"

namespace neck {

/// Why an image cannot be used, without its name: `the image is damaged (...); download it again`.
class ImageFault : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

/// \throws ImageFault always.
[[noreturn]] void damaged(std::string_view why);

/// RGB pixels, row by row.
struct Pixels {
    Size size;
    std::vector<std::byte> data;
    std::string warning;  ///< what was made up; empty if nothing
};

/// Upright RGB pixels that are filled with the rows of a file.
class Canvas {
public:
    Canvas(Size stored, int orientation);

    /// Puts RGB pixels of the file's row into their places: its columns first, first + step, ...
    void put(std::int64_t row, const std::uint8_t* rgb, std::int64_t first = 0, std::int64_t step = 1) noexcept;

    void warn(const std::string& why) { pixels_.warning = why; }

    Pixels take() { return std::move(pixels_); }

private:
    Size stored_;
    Pixels pixels_;
    std::int64_t start_ = 0;      ///< where the file's first pixel goes
    std::int64_t by_row_ = 0;     ///< from there to the pixel below
    std::int64_t by_column_ = 0;  ///< and to the one on the right
};

/// Decodes a PNG or JPEG file at its own size, upright.
/// \throws ImageFault damaged, or beyond the limits.
Pixels decode(std::string_view file, const ImageLimits& limits);

/// \throws ImageFault
void decode_png(const Header& header, Canvas& canvas);
void decode_jpeg(std::string_view file, const Header& header, Canvas& canvas);

}  // namespace neck
