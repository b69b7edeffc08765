#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "neck/image.hpp"
#include "images/resize_kernels.hpp"

namespace neck {

/// Pixels in memory, RGB, 8 bits.
struct PixelView {
    const std::uint8_t* data = nullptr;
    Size size;
    std::size_t pitch = 0;  ///< bytes from one row to the next
};

/// Resizes rows `first` to `last` of the wanted size; `take` gets each row's number and its RGB pixels, 8 bits.
///
/// First columns, rounded to 8 bits, then rows, as torch and Pillow do it: the other way round one value in ten is one
/// level off (a photo of 12 megapixels to 1008 x 1008).
void resize_rows(const PixelView& pixels, const Taps& down, const Taps& across, std::int64_t first, std::int64_t last,
                 const std::function<void(std::int64_t, const std::uint8_t*)>& take,
                 const ResizeKernels& kernels = best_kernels());

}  // namespace neck
