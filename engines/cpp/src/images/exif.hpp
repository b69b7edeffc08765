#pragma once

#include <string>

namespace neck {

/// What an image file says of its orientation, in the places where Pillow looks.
struct Metadata {
    std::string exif;        ///< as the file has it, `Exif\0\0` included
    std::string xmp;         ///< an XMP packet; empty if there is none
    bool tolerated = false;  ///< whether EXIF that cannot be parsed is ignored
};

/// The orientation, 1 to 8, by the rule of Pillow's `ImageOps.exif_transpose` (13.0): the number in the first tag 0x0112
/// of EXIF's first directory, whatever its numeric type; without such a tag the one in XMP. A text or bytes are no number.
/// \throws ImageFault EXIF that cannot be parsed, unless that is tolerated.
int orientation_of(const Metadata& metadata);

}  // namespace neck
