#pragma once

#include <cstddef>
#include <functional>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "neck/picture.hpp"

namespace neck {

/// Why a picture cannot be used, without its name: `is damaged (...); fetch it again`.
class PictureFault : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

/// RGB pixels, row by row.
struct Pixels {
    Size size;
    std::vector<std::byte> data;
};

/// Decodes a PNG or JPEG file at its own size, upright.
/// \param check is called with that size before pixels are unpacked, and may throw.
/// \throws PictureFault
Pixels decode(std::string_view file, const std::function<void(Size)>& check);

}  // namespace neck
