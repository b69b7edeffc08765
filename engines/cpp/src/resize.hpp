#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "neck/picture.hpp"

namespace neck {

/// Pixels in memory, RGB, 8 bits.
struct PixelView {
    const std::uint8_t* data = nullptr;
    Size size;
    std::size_t pitch = 0;  ///< bytes from one row to the next
};

/// Which pixels of a side make each pixel of another, and by what weights: bilinear with antialias, as Pillow and
/// torch.
class Taps {
public:
    struct Span {
        std::int64_t first = 0;
        std::size_t count = 0;
        std::size_t weights_at = 0;
    };
    Taps(std::int64_t from, std::int64_t to);

    const std::vector<Span>& spans() const { return spans_; }
    const float* weights_of(const Span& span) const { return weights_.data() + span.weights_at; }

private:
    std::vector<Span> spans_;
    std::vector<float> weights_;
};

/// Resizes rows `first` to `last` of the wanted size; `take` gets each row's number and its RGB pixels, 8 bits.
///
/// First columns, rounded to 8 bits, then rows, as torch and Pillow do it: the other way round one value in ten is one
/// level off (a photo of 12 megapixels to 1008 x 1008).
void resize_rows(const PixelView& pixels, const Taps& down, const Taps& across, std::int64_t first, std::int64_t last,
                 const std::function<void(std::int64_t, const std::uint8_t*)>& take);

}  // namespace neck
