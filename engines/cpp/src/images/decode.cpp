#include "images/decode.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "files/text.hpp"

namespace neck {

void damaged(std::string_view why) {
    throw ImageFault("the image is damaged (" + one_line(why) + "); download it again or save it as 8-bit RGB PNG");
}

Canvas::Canvas(Size stored, int orientation) : stored_(stored) {
    const bool turned = orientation >= 5;
    const Size upright = turned ? Size{stored.width, stored.height} : stored;
    pixels_.size = upright;
    pixels_.data.resize(static_cast<std::size_t>(upright.height * upright.width * 3));
    // what a step down or to the right in the file is in the upright image, and from which corner it starts
    by_row_ = turned ? 1 : upright.width;
    by_column_ = turned ? upright.width : 1;
    if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7) {
        start_ += by_row_ * (stored.height - 1);
        by_row_ = -by_row_;
    }
    if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) {
        start_ += by_column_ * (stored.width - 1);
        by_column_ = -by_column_;
    }
}

void Canvas::put(std::int64_t row, const std::uint8_t* rgb, std::int64_t first, std::int64_t step) noexcept {
    std::int64_t place = start_ + row * by_row_ + first * by_column_;
    if (step == 1 && by_column_ == 1) {
        std::memcpy(pixels_.data.data() + place * 3, rgb, static_cast<std::size_t>(stored_.width - first) * 3);
        return;
    }
    for (std::int64_t column = first; column < stored_.width; column += step, rgb += 3, place += step * by_column_) {
        std::memcpy(pixels_.data.data() + place * 3, rgb, 3);
    }
}

Pixels decode(std::string_view file, const ImageLimits& limits) {
    const Header header = read_header(file);
    const Size size = header.size;
    if (size.height > limits.most_pixels / size.width) {
        throw ImageFault("the image has more than " + std::to_string(limits.most_pixels) +
                         " pixels, the limit for decoding; reduce the size of the image");
    }
    // a scan goes over all pixels: at the largest size twelve take 4 s, and a smaller image may take as long
    const std::int64_t affordable = std::max<std::int64_t>(1, limits.most_pixels / (size.height * size.width) * 12);
    const std::int64_t allowed = std::min<std::int64_t>(limits.most_scans, affordable);
    if (header.scans > static_cast<std::size_t>(allowed)) {
        throw ImageFault("the image is a JPEG with " + std::to_string(header.scans) +
                         " scans, but an image of this size may have at most " + std::to_string(allowed) +
                         "; save the image again with fewer scans");
    }
    Canvas canvas(size, header.orientation);
    if (header.png) {
        decode_png(header, canvas);
    } else {
        decode_jpeg(file, header, canvas);
    }
    return canvas.take();
}

}  // namespace neck
