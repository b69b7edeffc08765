#pragma once

#include <cstddef>
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
/// \throws PictureFault
Pixels decode(std::string_view file);

}  // namespace neck
