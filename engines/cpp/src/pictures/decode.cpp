#include "pictures/decode.hpp"

#include <gd.h>
#include <gd_errors.h>

#include <array>
#include <cstdarg>
#include <cstdio>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "pictures/header.hpp"
#include "files/text.hpp"

namespace neck {
namespace {

constexpr std::int64_t most_pixels = 89'478'485;  // Pillow's limit, 2^28 bytes of RGB

/// The first thing that GD complained of in this thread since it was emptied.
thread_local std::array<char, 200> complaint{};

void on_message(int /*priority*/, const char* pattern, va_list arguments) {
    if (complaint[0] == '\0') {
        std::vsnprintf(complaint.data(), complaint.size(), pattern, arguments);
    }
}

struct GdFree {
    void operator()(gdImagePtr image) const { gdImageDestroy(image); }
};
using GdImage = std::unique_ptr<gdImage, GdFree>;

[[noreturn]] void damaged(std::string_view why) {
    throw PictureFault("is damaged (" + one_line(why) + "); fetch it again or save it as 8-bit RGB PNG");
}

/// Refuses pixels that libjpeg made up; two of its complaints are about other things than pixels.
void check_complaint() {
    const std::string_view told = complaint.data();
    const bool harmless = told.empty() || told.find(" extraneous bytes before marker") != std::string_view::npos ||
                          told.find("Unknown Adobe color transform") != std::string_view::npos;
    if (!harmless) {
        damaged(told.substr(told.rfind("error: ") == std::string_view::npos ? 0 : told.rfind("error: ") + 7));
    }
}

GdImage read_image(std::string_view file, bool png) {
    static std::once_flag once;  // GD writes to stderr else
    std::call_once(once, [] { gdSetErrorMethod(on_message); });
    complaint[0] = '\0';
    // GD's interface takes no pointer to const; it only reads
    auto* data = const_cast<char*>(file.data());  // NOLINT
    const int size = static_cast<int>(file.size());
    GdImage image(png ? gdImageCreateFromPngPtr(size, data) : gdImageCreateFromJpegPtrEx(size, data, 1));
    check_complaint();
    if (!image) {
        damaged("its pixels cannot be unpacked");
    }
    return image;
}

/// Where the pixel (row, column) of an upright picture lies in one of this size that EXIF says is to be turned.
std::pair<std::int64_t, std::int64_t> source_of(std::int64_t row, std::int64_t column, Size size, int orientation) {
    if (orientation >= 5) {
        std::swap(row, column);
    }
    const bool flip_rows = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    const bool flip_columns = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    return {flip_rows ? size.height - 1 - row : row, flip_columns ? size.width - 1 - column : column};
}

/// A colour of a picture, with a palette or without; alpha is dropped.
int color_at(const gdImage& image, std::int64_t row, std::int64_t column) {
    if (image.trueColor != 0) {
        return image.tpixels[row][column];
    }
    // gdImagePaletteToTrueColor would make the one that is transparent black
    const unsigned char index = image.pixels[row][column];
    return gdTrueColor(image.red[index], image.green[index], image.blue[index]);
}

Pixels take_pixels(const gdImage& image, const Header& header) {
    const Size size = header.size;
    Pixels pixels{header.orientation >= 5 ? Size{size.width, size.height} : size, {}};
    pixels.data.resize(static_cast<std::size_t>(size.height * size.width * 3));
    std::byte* target = pixels.data.data();
    for (std::int64_t row = 0; row < pixels.size.height; ++row) {
        for (std::int64_t column = 0; column < pixels.size.width; ++column, target += 3) {
            const auto [from_row, from_column] = source_of(row, column, size, header.orientation);
            const int color = color_at(image, from_row, from_column);
            target[0] = static_cast<std::byte>(gdTrueColorGetRed(color));
            target[1] = static_cast<std::byte>(gdTrueColorGetGreen(color));
            target[2] = static_cast<std::byte>(gdTrueColorGetBlue(color));
        }
    }
    return pixels;
}

}  // namespace

Pixels decode(std::string_view file) {
    const Header header = read_header(file);
    const Size size = header.size;
    if (size.height > most_pixels / size.width || file.size() > std::numeric_limits<int>::max()) {
        throw PictureFault("has more than the " + std::to_string(most_pixels) +
                           " pixels that are safe to unpack; make it smaller");
    }
    // a JPEG's end: libjpeg fills what is missing with grey
    if (!header.png && file.rfind("\xff\xd9") + 1 <= header.pixels_at) {
        damaged("it ends too early");
    }
    const GdImage image = read_image(file, header.png);
    if (gdImageSX(image.get()) != size.width || gdImageSY(image.get()) != size.height) {
        damaged("it has two sizes");
    }
    return take_pixels(*image, header);
}

}  // namespace neck
