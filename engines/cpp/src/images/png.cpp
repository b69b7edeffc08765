// PNG's pixels, unpacked as Pillow does it: checksums of pixels are not compared.
#include <zlib.h>

#include <array>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#include "images/decode.hpp"

namespace neck {
namespace {

/// Unpacks the chunks of pixels one after the other.
class Inflater {
public:
    explicit Inflater(const std::vector<std::string_view>& chunks) : chunks_(chunks) {
        if (inflateInit(&stream_) != Z_OK) {
            throw std::bad_alloc();
        }
    }
    ~Inflater() { inflateEnd(&stream_); }
    Inflater(const Inflater&) = delete;
    Inflater& operator=(const Inflater&) = delete;

    /// Fills a row.
    /// \throws ImageFault
    void read(std::vector<std::uint8_t>& row) {
        stream_.next_out = row.data();
        stream_.avail_out = static_cast<uInt>(row.size());
        while (stream_.avail_out > 0) {
            if (ended_ || (stream_.avail_in == 0 && !take_chunk())) {
                damaged("the file ends too early");
            }
            const int code = inflate(&stream_, Z_NO_FLUSH);
            if (code == Z_MEM_ERROR) {
                throw std::bad_alloc();
            }
            if (code != Z_OK && code != Z_STREAM_END && code != Z_BUF_ERROR) {
                damaged("the pixel data cannot be decompressed");
            }
            ended_ = code == Z_STREAM_END;
        }
    }

private:
    bool take_chunk() {
        while (next_ < chunks_.size() && chunks_[next_].empty()) {
            ++next_;
        }
        if (next_ == chunks_.size()) {
            return false;
        }
        const std::string_view chunk = chunks_[next_++];
        stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(chunk.data()));  // NOLINT: zlib only reads it
        stream_.avail_in = static_cast<uInt>(chunk.size());  // a chunk's length has 32 bits
        return true;
    }

    const std::vector<std::string_view>& chunks_;
    std::size_t next_ = 0;
    bool ended_ = false;
    z_stream stream_{};
};

/// The one of three neighbors that is nearest to left + above - corner. (PNG specification, 9.4)
int paeth(int left, int above, int corner) {
    const int to_left = std::abs(above - corner);
    const int to_above = std::abs(left - corner);
    const int to_corner = std::abs(left + above - 2 * corner);
    return to_left <= to_above && to_left <= to_corner ? left : to_above <= to_corner ? above : corner;
}

/// Undoes the filter of a row, whose first byte names it. (PNG specification, 9.2)
/// \param step bytes of a pixel, at least 1.
void unfilter(std::vector<std::uint8_t>& row, const std::vector<std::uint8_t>& above, std::size_t step) {
    const std::size_t count = row.size();
    const auto left = [&](std::size_t at) -> int { return at > step ? row[at - step] : 0; };
    const auto corner = [&](std::size_t at) -> int { return at > step ? above[at - step] : 0; };
    const auto add = [&](std::size_t at, int value) { row[at] = static_cast<std::uint8_t>(row[at] + value); };
    switch (row[0]) {
        case 0:
            break;
        case 1:
            for (std::size_t at = step + 1; at < count; ++at) {
                add(at, row[at - step]);
            }
            break;
        case 2:
            for (std::size_t at = 1; at < count; ++at) {
                add(at, above[at]);
            }
            break;
        case 3:
            for (std::size_t at = 1; at < count; ++at) {
                add(at, (left(at) + above[at]) / 2);
            }
            break;
        case 4:
            for (std::size_t at = 1; at < count; ++at) {
                add(at, paeth(left(at), above[at], corner(at)));
            }
            break;
        default:
            damaged("a row of pixels has an unknown PNG filter");
    }
}

using Palette = std::array<std::array<std::uint8_t, 3>, 256>;

/// The RGB colors of every value of a sample of up to 8 bits: a palette's, where missing entries are black, or gray.
Palette make_palette(const Header& header) {
    Palette palette{};
    const int most = (1 << (header.depth < 8 ? header.depth : 8)) - 1;
    for (int value = 0; value <= most; ++value) {
        auto& color = palette[static_cast<std::size_t>(value)];
        const auto at = static_cast<std::size_t>(value) * 3;
        if (header.color != 3) {
            color.fill(static_cast<std::uint8_t>(value * 255 / most));
        } else if (at + 3 <= header.palette.size()) {
            for (std::size_t channel = 0; channel < 3; ++channel) {
                color[channel] = static_cast<std::uint8_t>(header.palette[at + channel]);
            }
        }
    }
    return palette;
}

/// Samples of a row to RGB; alpha is dropped, of 16 bits the high byte is taken.
void convert(const std::uint8_t* samples, std::size_t count, const Header& header, std::size_t channels,
             const Palette& palette, std::uint8_t* rgb) {
    if (channels < 3 && header.depth <= 8) {
        const auto depth = static_cast<std::size_t>(header.depth);
        const unsigned mask = (1U << depth) - 1;
        for (std::size_t index = 0; index < count; ++index, rgb += 3) {
            const std::size_t bit = index * channels * depth;
            const unsigned value = samples[bit / 8] >> (8 - depth - bit % 8) & mask;
            rgb[0] = palette[value][0];
            rgb[1] = palette[value][1];
            rgb[2] = palette[value][2];
        }
        return;
    }
    const std::size_t wide = header.depth == 16 ? 2 : 1;
    const std::size_t next = channels < 3 ? 0 : wide;
    for (std::size_t index = 0; index < count; ++index, rgb += 3, samples += channels * wide) {
        rgb[0] = samples[0];
        rgb[1] = samples[next];
        rgb[2] = samples[2 * next];
    }
}

/// The pixels of one of seven passes: from where on, and each how many. (PNG specification, 8.2)
struct Pass {
    int row = 0;
    int column = 0;
    int down = 1;
    int right = 1;
};
constexpr std::array<Pass, 7> interlaced{
    {{0, 0, 8, 8}, {0, 4, 8, 8}, {4, 0, 8, 4}, {0, 2, 4, 4}, {2, 0, 4, 2}, {0, 1, 2, 2}, {1, 0, 2, 1}}};

}  // namespace

void decode_png(const Header& header, Canvas& canvas) {
    const std::size_t channels = header.color == 2 ? 3 : header.color == 6 ? 4 : header.color == 4 ? 2 : 1;
    const std::size_t bits = channels * static_cast<std::size_t>(header.depth);
    const Palette palette = make_palette(header);
    Inflater inflater(header.pixels);
    std::vector<std::uint8_t> rgb(static_cast<std::size_t>(header.size.width) * 3);
    for (std::size_t index = 0; index < (header.interlaced ? interlaced.size() : 1); ++index) {
        const Pass pass = header.interlaced ? interlaced[index] : Pass{};
        if (header.size.width <= pass.column) {
            continue;
        }
        const auto count = static_cast<std::size_t>((header.size.width - pass.column + pass.right - 1) / pass.right);
        std::vector<std::uint8_t> row(1 + (count * bits + 7) / 8);
        std::vector<std::uint8_t> above(row.size());
        for (std::int64_t at = pass.row; at < header.size.height; at += pass.down) {
            inflater.read(row);
            unfilter(row, above, bits < 8 ? 1 : bits / 8);
            convert(row.data() + 1, count, header, channels, palette, rgb.data());
            canvas.put(at, rgb.data(), pass.column, pass.right);
            row.swap(above);
        }
    }
}

}  // namespace neck
