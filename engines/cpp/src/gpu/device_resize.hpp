#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "images/taps.hpp"

namespace neck {

/// One image in device memory, and where the model reads it.
struct DeviceResize {
    const std::uint8_t* pixels = nullptr;  ///< RGB, 8 bits
    std::int64_t height = 0;
    std::int64_t width = 0;
    std::size_t pitch = 0;   ///< bytes from one row to the next
    void* target = nullptr;  ///< float32 (3, H, W), or uint8 (H, W, 3)
    std::int64_t target_height = 0;
    std::int64_t target_width = 0;
    bool normalized = false;  ///< float32
};

/// Computes one pixel of the model's input: the kernel's body, which is plain C++, too.
NECK_EVERYWHERE inline void resize_pixel(const DeviceResize& job, std::int64_t row, std::int64_t column) {
    const TapSpan down(job.height, job.target_height, row);
    const TapSpan across(job.width, job.target_width, column);
    float sums[3] = {0, 0, 0};
    float total = 0;
    for (std::int64_t y = down.first; y < down.end; ++y) {
        const std::uint8_t* line = job.pixels + static_cast<std::size_t>(y) * job.pitch;
        const auto weight = static_cast<float>(down.weight(y));
        for (std::int64_t x = across.first; x < across.end; ++x) {
            const float both = weight * static_cast<float>(across.weight(x));
            total += both;
            for (int channel = 0; channel < 3; ++channel) {
                sums[channel] += both * static_cast<float>(line[x * 3 + channel]);
            }
        }
    }
    const std::int64_t place = row * job.target_width + column;
    for (int channel = 0; channel < 3; ++channel) {
        const float value = sums[channel] / total + 0.5F;
        const auto level = static_cast<std::uint8_t>(value < 255 ? value : 255);
        if (job.normalized) {
            static_cast<float*>(job.target)[channel * job.target_height * job.target_width + place] = normalized(level);
        } else {
            static_cast<std::uint8_t*>(job.target)[place * 3 + channel] = level;
        }
    }
}

/// Queues it on a stream.
/// \return cudaErrorNotSupported where the library was built without nvcc.
cudaError_t launch_resize(const DeviceResize& job, cudaStream_t stream);

}  // namespace neck
