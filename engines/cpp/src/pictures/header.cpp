#include "pictures/header.hpp"

#include <optional>

#include "pictures/decode.hpp"

namespace neck {
namespace {

constexpr std::string_view png_magic = "\x89PNG\r\n\x1a\n";
constexpr std::string_view jpeg_magic = "\xff\xd8\xff";
constexpr std::string_view exif_magic = std::string_view("Exif\0\0", 6);

/// A number of a few bytes; 0 beyond the end.
std::size_t number(std::string_view text, std::size_t at, std::size_t bytes, bool little = false) {
    if (at > text.size() || bytes > text.size() - at) {
        return 0;
    }
    std::size_t value = 0;
    for (std::size_t index = 0; index < bytes; ++index) {
        value = value << 8U | static_cast<unsigned char>(text[at + (little ? bytes - 1 - index : index)]);
    }
    return value;
}

/// The orientation in EXIF data, from `II*` or `MM*` on.
std::optional<int> orientation_of_exif(std::string_view exif) {
    constexpr std::size_t tag = 0x0112;
    constexpr std::size_t entry = 12;
    const bool little = exif.substr(0, 1) == "I";
    const std::size_t directory = number(exif, 4, 4, little);
    const std::size_t count = number(exif, directory, 2, little);
    for (std::size_t index = 0; index < count; ++index) {
        const std::size_t at = directory + 2 + index * entry;
        if (at > exif.size()) {
            break;
        }
        const std::size_t turn = number(exif, at + 8, 2, little);
        if (number(exif, at, 2, little) == tag && turn >= 1 && turn <= 8) {
            return static_cast<int>(turn);
        }
    }
    return std::nullopt;
}

Header read_png(std::string_view file) {
    Header header{true, {}};
    for (std::size_t at = png_magic.size(); at + 8 <= file.size();) {
        const std::size_t length = number(file, at, 4);
        const std::string_view kind = file.substr(at + 4, 4);
        const std::string_view content = file.substr(at + 8, length);
        if (kind == "IHDR") {
            header.size = {static_cast<std::int64_t>(number(content, 4, 4)),
                           static_cast<std::int64_t>(number(content, 0, 4))};
        } else if (kind == "eXIf") {
            header.orientation = orientation_of_exif(content).value_or(1);
        } else if (kind == "IDAT" && header.pixels_at == 0) {
            header.pixels_at = at;
        }
        at += length + 12;  // length, kind and CRC
    }
    return header;
}

/// Whether a JPEG's segment is a frame's header, which has the size.
bool is_frame(std::size_t marker) {
    return marker >= 0xc0 && marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc;
}

Header read_jpeg(std::string_view file) {
    Header header;
    std::size_t at = 2;
    while (at + 4 <= file.size() && header.pixels_at == 0) {
        const std::size_t marker = number(file, at + 1, 1);
        if (number(file, at, 1) != 0xff || marker == 0xff || marker == 0) {
            ++at;  // padding
            continue;
        }
        const std::size_t length = number(file, at + 2, 2);
        const std::string_view content = file.substr(at + 4).substr(0, length < 2 ? 0 : length - 2);
        if (is_frame(marker)) {
            header.size = {static_cast<std::int64_t>(number(content, 1, 2)),
                           static_cast<std::int64_t>(number(content, 3, 2))};
        } else if (marker == 0xe1 && content.substr(0, exif_magic.size()) == exif_magic) {
            header.orientation = orientation_of_exif(content.substr(exif_magic.size())).value_or(1);
        } else if (marker == 0xda) {
            header.pixels_at = at;
        }
        at += 2 + length;
    }
    return header;
}

}  // namespace

Header read_header(std::string_view file) {
    if (file.empty()) {
        throw PictureFault("is empty (0 bytes); fetch or save it again");
    }
    const bool png = file.substr(0, png_magic.size()) == png_magic;
    if (!png && file.substr(0, jpeg_magic.size()) != jpeg_magic) {
        throw PictureFault("is damaged or in no known format (PNG, JPEG); fetch it again or convert it to PNG");
    }
    const Header header = png ? read_png(file) : read_jpeg(file);
    if (header.size.height == 0 || header.size.width == 0 || header.pixels_at == 0) {
        throw PictureFault(
            "is damaged (it tells no size, or has no pixels); fetch it again or save it as 8-bit RGB PNG");
    }
    return header;
}

}  // namespace neck
