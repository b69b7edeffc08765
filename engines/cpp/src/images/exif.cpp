#include "images/exif.hpp"

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>

#include "images/decode.hpp"

namespace neck {
namespace {

constexpr std::string_view exif_prefix("Exif\0\0", 6);
constexpr std::size_t orientation_tag = 0x0112;

/// A TIFF structure in memory; numbers beyond its end are absent.
class Tiff {
public:
    explicit Tiff(std::string_view data) : data_(data), little_(data.substr(0, 1) == "I") {}

    std::optional<std::uint64_t> number(std::size_t at, std::size_t bytes) const {
        if (at > data_.size() || bytes > data_.size() - at) {
            return std::nullopt;
        }
        std::uint64_t value = 0;
        for (std::size_t index = 0; index < bytes; ++index) {
            const std::size_t place = little_ ? bytes - 1 - index : index;
            value = value << 8U | static_cast<unsigned char>(data_[at + place]);
        }
        return value;
    }

    std::size_t size() const { return data_.size(); }

private:
    std::string_view data_;
    bool little_;
};

/// Bytes of one value by TIFF's number of a type; 0 is a type that Pillow does not read.
std::size_t bytes_of_type(std::uint64_t type) {
    constexpr std::array<std::size_t, 17> sizes{0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8};
    return type < sizes.size() ? sizes[type] : 0;
}

template <typename Float, typename Bits>
int whole_float(std::uint64_t bits) {
    const Bits narrow = static_cast<Bits>(bits);
    Float value = 0;
    std::memcpy(&value, &narrow, sizeof value);
    return value >= 1 && value <= 8 && value == static_cast<Float>(static_cast<int>(value)) ? static_cast<int>(value) : 1;
}

/// A fraction that is a whole number from 1 to 8, else 1. Signs cancel, as in Python's Fraction.
int whole_fraction(std::int64_t above, std::int64_t below) {
    if (below == 0 || above % below != 0) {
        return 1;
    }
    const std::int64_t value = above / below;
    return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
}

/// The orientation in a value of any type.
int orientation_at(const Tiff& tiff, std::uint64_t type, std::size_t at) {
    const auto number = [&](std::size_t place, std::size_t bytes) { return tiff.number(place, bytes).value_or(0); };
    const auto whole = [](std::uint64_t value) { return value >= 1 && value <= 8 ? static_cast<int>(value) : 1; };
    switch (type) {
        case 3:   // short
        case 8:   // signed short
        case 6:   // signed byte
        case 4:   // long
        case 9:   // signed long
        case 13:  // directory
        case 16:  // 64 bits
            return whole(number(at, bytes_of_type(type)));
        case 5:  // fraction
            return whole_fraction(static_cast<std::int64_t>(number(at, 4)), static_cast<std::int64_t>(number(at + 4, 4)));
        case 10:  // signed fraction
            return whole_fraction(static_cast<std::int32_t>(number(at, 4)), static_cast<std::int32_t>(number(at + 4, 4)));
        case 11:
            return whole_float<float, std::uint32_t>(number(at, 4));
        case 12:
            return whole_float<double, std::uint64_t>(number(at, 8));
        default:  // bytes and texts
            return 1;
    }
}

/// The orientation in a TIFF's first directory; absent if it has none.
/// \throws ImageFault no TIFF.
std::optional<int> orientation_of_tiff(std::string_view data) {
    constexpr std::array<std::string_view, 6> heads{std::string_view("MM\0\x2a", 4), std::string_view("II\x2a\0", 4),
                                                    std::string_view("MM\x2a\0", 4), std::string_view("II\0\x2a", 4),
                                                    std::string_view("MM\0\x2b", 4), std::string_view("II\x2b\0", 4)};
    const Tiff tiff(data);
    const std::string_view head = data.substr(0, 4);
    bool known = false;
    for (const std::string_view each : heads) {
        known = known || head == each;
    }
    const auto first = tiff.number(4, 4);
    if (!known || !first || head == heads[5]) {
        throw ImageFault(
            "the image is damaged (its EXIF metadata are not a TIFF structure); save the image again or remove "
            "its metadata");
    }
    std::size_t at = *first;
    const auto count = tiff.number(at, 2);
    std::uint64_t outside = 0;  // bytes of values that lie elsewhere
    at += 2;
    for (std::uint64_t index = 0; index < count.value_or(0); ++index, at += 12) {
        const auto tag = tiff.number(at, 2);
        const auto last = tiff.number(at + 8, 4);
        if (!tag || !last) {
            break;
        }
        const std::uint64_t type = *tiff.number(at + 2, 2);
        const std::uint64_t size = *tiff.number(at + 4, 4) * bytes_of_type(type);
        std::size_t place = at + 8;
        if (size > 4) {
            outside += size;
            if (outside > tiff.size()) {
                continue;
            }
            place = *last;
            if (place > tiff.size() || size > tiff.size() - place) {
                break;
            }
        }
        if (*tag == orientation_tag && size > 0) {
            return orientation_at(tiff, type, place);
        }
    }
    return std::nullopt;
}

int orientation_of_xmp(std::string_view xmp) {
    constexpr std::string_view key = "tiff:Orientation";
    for (std::size_t at = xmp.find(key); at != std::string_view::npos; at = xmp.find(key, at + 1)) {
        std::string_view rest = xmp.substr(at + key.size());
        rest.remove_prefix(rest.substr(0, 2) == "=\"" ? 2 : rest.substr(0, 1) == ">" ? 1 : rest.size());
        if (!rest.empty() && rest[0] >= '0' && rest[0] <= '9') {
            return rest[0] >= '1' && rest[0] <= '8' ? rest[0] - '0' : 1;
        }
    }
    return 1;
}

}  // namespace

int orientation_of(const Metadata& metadata) {
    std::string_view exif = metadata.exif;
    for (int times = 0; times < 2 && exif.substr(0, exif_prefix.size()) == exif_prefix; ++times) {
        exif.remove_prefix(exif_prefix.size());
    }
    try {
        if (const auto found = exif.empty() ? std::nullopt : orientation_of_tiff(exif)) {
            return *found;
        }
    } catch (const ImageFault&) {
        if (!metadata.tolerated) {
            throw;
        }
        return 1;
    }
    return orientation_of_xmp(metadata.xmp);
}

}  // namespace neck
