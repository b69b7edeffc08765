#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NECK_EVERYWHERE __host__ __device__
#else
#define NECK_EVERYWHERE
#endif

namespace neck {

/// The pixels of one side that make pixel `index` of another, and by what weights, on the CPU and on the GPU: bilinear
/// with antialias, as Pillow and torch.
struct TapSpan {
    double center = 0;
    double reach = 1;  ///< of the triangle that weights: one pixel or more
    std::int64_t first = 0;
    std::int64_t end = 0;

    NECK_EVERYWHERE TapSpan(std::int64_t from, std::int64_t to, std::int64_t index) {
        const double scale = static_cast<double>(from) / static_cast<double>(to);
        reach = scale > 1 ? scale : 1;
        center = (static_cast<double>(index) + 0.5) * scale;
        const double low = center - reach + 0.5;
        const double high = center + reach + 0.5;
        first = low > 0 ? static_cast<std::int64_t>(low) : 0;
        end = high < static_cast<double>(from) ? static_cast<std::int64_t>(high) : from;
    }

    /// Before they are divided by their sum.
    NECK_EVERYWHERE double weight(std::int64_t at) const {
        const double distance = (static_cast<double>(at) - center + 0.5) / reach;
        const double weight = 1 - (distance < 0 ? -distance : distance);
        return weight > 0 ? weight : 0;
    }
};

/// 0..255 to -1..1 by two roundings, float32(2 / 255), then less 1; neck/images.py says why.
NECK_EVERYWHERE inline float normalized(std::uint8_t level) {
    const float scaled = static_cast<float>(level) * static_cast<float>(2.0 / 255.0);
    return scaled - 1.0F;
}

}  // namespace neck
