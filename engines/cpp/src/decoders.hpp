#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "files.hpp"
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

/// \throws PictureFault
Pixels decode_png(const MappedFile& file, Size wanted);

/// \throws PictureFault
Pixels decode_jpeg(const MappedFile& file, Size wanted);

/// Refuses a size before its pixels are unpacked.
void check_size(Size found, Size wanted);

/// Refuses a picture that its EXIF data (from `II*` or `MM*` on) says is to be turned; Python turns it.
void check_upright(const unsigned char* exif, std::size_t size);

}  // namespace neck
