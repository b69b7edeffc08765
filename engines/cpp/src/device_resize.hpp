#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define NECK_EVERYWHERE __host__ __device__
#else
#define NECK_EVERYWHERE
#endif

namespace neck {

/// One picture in device memory, and where the model reads it.
struct DeviceResize {
    const std::uint8_t* pixels = nullptr;  ///< RGB, 8 bits
    std::int64_t height = 0;
    std::int64_t width = 0;
    std::size_t pitch = 0;   ///< bytes from one row to the next
    void* target = nullptr;  ///< float32 (3, H, W), or uint8 (H, W, 3)
    std::int64_t target_height = 0;
    std::int64_t target_width = 0;
    bool normalised = false;  ///< float32
};

/// The pixels of one side that make a pixel of another: `Taps`, one at a time.
struct DeviceSpan {
    double center = 0;
    double reach = 1;
    std::int64_t first = 0;
    std::int64_t end = 0;

    NECK_EVERYWHERE DeviceSpan(std::int64_t from, std::int64_t to, std::int64_t index) {
        const double scale = static_cast<double>(from) / static_cast<double>(to);
        reach = scale > 1 ? scale : 1;
        center = (static_cast<double>(index) + 0.5) * scale;
        const double low = center - reach + 0.5;
        const double high = center + reach + 0.5;
        first = low > 0 ? static_cast<std::int64_t>(low) : 0;
        end = high < static_cast<double>(from) ? static_cast<std::int64_t>(high) : from;
    }

    NECK_EVERYWHERE float weight(std::int64_t at) const {
        const double distance = (static_cast<double>(at) - center + 0.5) / reach;
        const double weight = 1 - (distance < 0 ? -distance : distance);
        return weight > 0 ? static_cast<float>(weight) : 0.0F;
    }
};

/// Computes one pixel of the model's input: the kernel's body, which is plain C++, too.
NECK_EVERYWHERE inline void resize_pixel(const DeviceResize& job, std::int64_t row, std::int64_t column) {
    const DeviceSpan down(job.height, job.target_height, row);
    const DeviceSpan across(job.width, job.target_width, column);
    float sums[3] = {0, 0, 0};
    float total = 0;
    for (std::int64_t y = down.first; y < down.end; ++y) {
        const std::uint8_t* line = job.pixels + static_cast<std::size_t>(y) * job.pitch;
        const float weight = down.weight(y);
        for (std::int64_t x = across.first; x < across.end; ++x) {
            const float both = weight * across.weight(x);
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
        if (job.normalised) {
            const float scaled = static_cast<float>(level) * static_cast<float>(2.0 / 255.0);
            static_cast<float*>(job.target)[channel * job.target_height * job.target_width + place] = scaled - 1.0F;
        } else {
            static_cast<std::uint8_t*>(job.target)[place * 3 + channel] = level;
        }
    }
}

/// Queues it on a stream.
/// \return cudaErrorNotSupported where the library was built without nvcc.
cudaError_t launch_resize(const DeviceResize& job, cudaStream_t stream);

}  // namespace neck
