#include "images/header.hpp"

#include <zlib.h>

#include <algorithm>
#include <cctype>
#include <limits>
#include <new>
#include <string>
#include <utility>

#include "files/text.hpp"
#include "images/decode.hpp"
#include "images/exif.hpp"

namespace neck {
namespace {

constexpr std::string_view png_magic = "\x89PNG\r\n\x1a\n";
constexpr std::string_view jpeg_magic = "\xff\xd8\xff";
constexpr std::string_view exif_magic("Exif\0\0", 6);
constexpr std::string_view xmp_magic("http://ns.adobe.com/xap/1.0/\0", 29);
constexpr std::size_t largest_text = std::size_t{1} << 20U;  // Pillow's limit for text that is unpacked

/// A number of a few bytes, the highest first; 0 beyond the end.
std::size_t number(std::string_view text, std::size_t at, std::size_t bytes) {
    if (at > text.size() || bytes > text.size() - at) {
        return 0;
    }
    std::size_t value = 0;
    for (std::size_t index = 0; index < bytes; ++index) {
        value = value << 8U | static_cast<unsigned char>(text[at + index]);
    }
    return value;
}

bool begins(std::string_view text, std::string_view with) { return text.substr(0, with.size()) == with; }

/// What lies before the first zero byte, which is taken off too; false if there is none.
bool take_field(std::string_view& text, std::string_view& field) {
    const std::size_t end = text.find('\0');
    if (end == std::string_view::npos) {
        return false;
    }
    field = text.substr(0, end);
    text.remove_prefix(end + 1);
    return true;
}

/// Unpacks text; empty if it is damaged.
std::string unpack(std::string_view packed) {
    std::string text(std::min(largest_text, packed.size() * 1032 + 64), '\0');  // deflate's largest ratio is 1032
    z_stream stream{};
    if (inflateInit(&stream) != Z_OK) {
        throw std::bad_alloc();
    }
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(packed.data()));  // NOLINT: zlib only reads it
    stream.avail_in = static_cast<uInt>(std::min<std::size_t>(packed.size(), std::numeric_limits<uInt>::max()));
    stream.next_out = reinterpret_cast<Bytef*>(text.data());
    stream.avail_out = static_cast<uInt>(text.size());
    const int code = inflate(&stream, Z_SYNC_FLUSH);
    const bool rest = stream.avail_in > 0 && code != Z_STREAM_END;
    text.resize(text.size() - stream.avail_out);
    inflateEnd(&stream);
    if (rest && text.size() == largest_text) {
        damaged("the text metadata are larger than 1 MiB when unpacked");
    }
    return code == Z_OK || code == Z_STREAM_END || code == Z_BUF_ERROR ? text : std::string();
}

/// The bytes of `Raw profile type exif`: hexadecimal digits from the fourth line on.
std::string from_hex(std::string_view text) {
    for (int line = 0; line < 3; ++line) {
        const std::size_t end = text.find('\n');
        text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    }
    const auto digit = [](char letter) {
        if (letter >= '0' && letter <= '9') {
            return letter - '0';
        }
        const char low = static_cast<char>(letter | 0x20);
        return low >= 'a' && low <= 'f' ? low - 'a' + 10 : -1;
    };
    std::string bytes;
    while (!text.empty()) {
        if (std::string_view(" \t\n\r\f\v").find(text[0]) != std::string_view::npos) {
            text.remove_prefix(1);
            continue;
        }
        const int high = digit(text[0]);
        const int low = text.size() > 1 ? digit(text[1]) : -1;
        if (high < 0 || low < 0) {
            damaged("the EXIF profile contains characters other than hexadecimal digits");
        }
        bytes += static_cast<char>(high * 16 + low);
        text.remove_prefix(2);
    }
    return bytes;
}

/// What a PNG's chunks say of its orientation, each key as the last chunk has it.
class PngTexts {
public:
    void take(std::string_view kind, std::string_view content) {
        if (kind == "eXIf") {
            exif_ = std::string(exif_magic) + std::string(content);
            has_exif_ = true;
        } else if (kind == "tEXt" || kind == "zTXt") {
            take_text(kind == "zTXt", content);
        } else if (kind == "iTXt") {
            take_international(content);
        }
    }

    Metadata metadata() const {
        return {has_exif_ ? exif_ : has_profile_ ? from_hex(profile_) : std::string(), xmp_, false};
    }

private:
    void take_text(bool packed, std::string_view content) {
        std::string_view key = content;
        if (take_field(content, key)) {
            if (packed && !content.empty() && content[0] != '\0') {
                damaged("the text metadata are compressed with an unknown method");
            }
        } else {
            content = {};
        }
        if (key == "Raw profile type exif" || key == "XML:com.adobe.xmp" || (key == "exif" && !packed)) {
            keep(key, packed && !content.empty() ? unpack(content.substr(1)) : std::string(content));
        }
    }

    void take_international(std::string_view content) {
        std::string_view key;
        std::string_view language;
        std::string_view translated;
        if (!take_field(content, key) || content.size() < 2) {
            return;
        }
        const bool packed = content[0] != '\0';
        const bool known = content[1] == '\0';
        content.remove_prefix(2);
        if (!take_field(content, language) || !take_field(content, translated) || (packed && !known)) {
            return;
        }
        if (key == "Raw profile type exif" || key == "XML:com.adobe.xmp") {
            keep(key, packed ? unpack(content) : std::string(content));
        }
    }

    void keep(std::string_view key, std::string text) {
        if (key == "Raw profile type exif") {
            profile_ = std::move(text);
            has_profile_ = true;
        } else if (key == "exif") {
            exif_ = std::move(text);
            has_exif_ = true;
        } else {
            xmp_ = std::move(text);
        }
    }

    bool has_exif_ = false;
    bool has_profile_ = false;
    std::string exif_;
    std::string profile_;
    std::string xmp_;
};

void take_ihdr(std::string_view content, Header& header) {
    if (content.size() < 13) {
        damaged("the PNG header is too short");
    }
    header.size = {static_cast<std::int64_t>(number(content, 4, 4)), static_cast<std::int64_t>(number(content, 0, 4))};
    header.depth = static_cast<unsigned char>(content[8]);
    header.color = static_cast<unsigned char>(content[9]);
    header.interlaced = content[12] != '\0';
    const bool gray = header.color == 0;
    const bool indexed = header.color == 3;
    const bool known = gray || indexed || header.color == 2 || header.color == 4 || header.color == 6;
    const bool small = header.depth == 1 || header.depth == 2 || header.depth == 4;
    if (!known || content[11] != '\0' ||
        !(header.depth == 8 || (header.depth == 16 && !indexed) || (small && (gray || indexed)))) {
        damaged("the PNG header contains an invalid pixel type");
    }
}

Header read_png(std::string_view file) {
    Header header;
    header.png = true;
    PngTexts texts;
    bool ended = false;  // the run of chunks with pixels
    for (std::size_t at = png_magic.size(); at + 8 <= file.size();) {
        const std::size_t length = number(file, at, 4);
        const std::string_view kind = file.substr(at + 4, 4);
        const std::string_view content = file.substr(at + 8, length);
        const bool named = std::all_of(kind.begin(), kind.end(), [](unsigned char letter) {
            return std::isalnum(letter) != 0 || letter == '_';
        });
        const bool before = header.pixels.empty();
        if (!named && before) {
            damaged("a PNG chunk has an invalid name");
        } else if (!named || kind == "IEND") {
            break;
        } else if (kind == "IDAT") {
            if (!ended) {
                header.pixels.push_back(content);
            }
        } else {
            ended = !before;
            if (before && (content.size() < length || at + 12 + length > file.size() ||
                           crc32(crc32(0, nullptr, 0), reinterpret_cast<const Bytef*>(kind.data()),
                                 static_cast<uInt>(4 + length)) != number(file, at + 8 + length, 4))) {
                damaged("the checksum of the PNG chunk " + repr(kind) + " is wrong");
            }
            if (kind == "IHDR" && before) {
                take_ihdr(content, header);
            } else if (kind == "PLTE" && before) {
                header.palette = content;
            } else if (content.size() < length) {
                damaged("the file ends too early");
            } else {
                texts.take(kind, content);
            }
        }
        at += length + 12;  // length, kind and CRC
    }
    header.orientation = orientation_of(texts.metadata());
    return header;
}

/// Whether a JPEG's segment is a frame's header, which has the size.
bool is_frame(std::size_t marker) {
    return (marker >= 0xc0 && marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc) || marker == 0xde;
}

/// Whether a marker has no content.
bool stands_alone(std::size_t marker) {
    return marker == 0 || marker == 0xc8 || (marker >= 0xd0 && marker <= 0xd9) || (marker >= 0xf0 && marker != 0xfe);
}

/// The scans of a JPEG, counted up to its end; `at` is where the first one's marker is.
std::size_t count_scans(std::string_view file, std::size_t at) {
    std::size_t scans = 0;
    while (at + 4 <= file.size()) {
        const std::size_t marker = number(file, at + 1, 1);
        if (file[at] != '\xff' || marker == 0 || marker == 0xff || (marker >= 0xd0 && marker <= 0xd7)) {
            at = std::min(file.find('\xff', at + 1), file.size());
            continue;
        }
        if (marker == 0xd9) {
            break;
        }
        scans += marker == 0xda ? 1 : 0;
        at += marker == 0xd8 || marker == 0x01 ? 2 : 2 + number(file, at + 2, 2);
    }
    return scans;
}

Header read_jpeg(std::string_view file) {
    Header header;
    Metadata metadata;
    bool has_exif = false;
    metadata.tolerated = true;
    std::size_t at = 2;
    while (at + 2 <= file.size() && header.scans == 0) {
        const std::size_t marker = number(file, at + 1, 1);
        if (file[at] != '\xff' || marker == 0xff) {
            ++at;
            continue;
        }
        if (stands_alone(marker)) {
            at += 2;
            continue;
        }
        if (marker < 0xc0) {
            damaged("the file contains an unknown JPEG marker");
        }
        const std::size_t length = number(file, at + 2, 2);
        const std::string_view content = file.substr(std::min(at + 4, file.size())).substr(0, length < 2 ? 0 : length - 2);
        if (content.size() + 2 < length) {
            damaged("the file ends too early");
        }
        if (is_frame(marker)) {
            header.size = {static_cast<std::int64_t>(number(content, 1, 2)),
                           static_cast<std::int64_t>(number(content, 3, 2))};
        } else if (marker == 0xe0 && begins(content, "JFIF") && content.size() >= 12) {
            metadata.tolerated = content[7] != 1 && content[7] != 2;  // with a resolution Pillow does not look early
        } else if (marker == 0xe1 && begins(content, exif_magic)) {
            metadata.exif += has_exif ? content.substr(exif_magic.size()) : content;
            has_exif = true;
        } else if (marker == 0xe1 && begins(content, xmp_magic)) {
            metadata.xmp = content.substr(xmp_magic.size());
        } else if (marker == 0xda) {
            header.scans = count_scans(file, at);
        }
        at += 2 + std::max<std::size_t>(2, length);
    }
    header.orientation = orientation_of(metadata);
    return header;
}

}  // namespace

Header read_header(std::string_view file) {
    if (file.empty()) {
        throw ImageFault("the image file is empty (0 bytes); download or save it again");
    }
    const bool png = begins(file, png_magic);
    if (!png && !begins(file, jpeg_magic)) {
        throw ImageFault(
            "the image is damaged or has an unknown format (PNG and JPEG are supported); download it again or convert "
            "it to PNG");
    }
    Header header = png ? read_png(file) : read_jpeg(file);
    if (header.size.height == 0 || header.size.width == 0 || (png ? header.pixels.empty() : header.scans == 0)) {
        throw ImageFault(
            "the image is damaged: its width or height is 0 or missing, or the file contains no pixel data. Download "
            "the image again, or save the undamaged original as 8-bit RGB PNG");
    }
    return header;
}

}  // namespace neck
