#include "resizes.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "expect.hpp"
#include "neck/preprocess.hpp"

neck::Tensor colors_of(neck::Size size) {
    neck::Tensor pixels{"pixels", neck::DataType::uint8, {1, size.height, size.width, 3}, {}};
    unsigned value = 1;
    for (std::int64_t index = 0; index < size.height * size.width * 3; ++index) {
        value = value * 1664525U + 1013904223U;
        pixels.data.push_back(static_cast<std::byte>(value >> 24U));
    }
    return pixels;
}

std::size_t target_bytes(const neck::DeviceResize& job) {
    const auto values = static_cast<std::size_t>(job.target_height * job.target_width * 3);
    return job.normalized ? values * sizeof(float) : values;
}

namespace {

/// Whether no value is more than one level off.
bool near(const neck::Tensor& one, const neck::Tensor& other, bool normalized) {
    const std::vector<float> left = one.to_floats();
    const std::vector<float> right = other.to_floats();
    bool all = left.size() == right.size();
    for (std::size_t index = 0; index < left.size(); ++index) {
        all = all && std::abs(left[index] - right[index]) < (normalized ? 2.01F / 255 : 1.01F);
    }
    return all;
}

}  // namespace

void test_resizes(const std::function<void(const neck::DeviceResize&)>& run) {
    for (const auto& [from, to] : std::vector<std::pair<neck::Size, neck::Size>>{
             {{7, 5}, {7, 5}}, {{1, 1}, {4, 3}}, {{3, 90}, {16, 16}}, {{61, 47}, {14, 28}}, {{5, 9}, {33, 8}}}) {
        const neck::Tensor pixels = colors_of(from);
        for (const bool normalized : {true, false}) {
            const neck::Port input{
                "image", normalized ? neck::DataType::float32 : neck::DataType::uint8,
                normalized ? neck::Shape{1, 3, to.height, to.width} : neck::Shape{1, to.height, to.width, 3}};
            const neck::Tensor wanted = neck::Preprocessor(input, 2).prepare(pixels).image;
            neck::Tensor found = wanted;
            std::fill(found.data.begin(), found.data.end(), std::byte{255});
            neck::DeviceResize job{reinterpret_cast<const std::uint8_t*>(pixels.data.data()), from.height, from.width,
                                   static_cast<std::size_t>(from.width) * 3};
            job.target = found.data.data();
            job.target_height = to.height;
            job.target_width = to.width;
            job.normalized = normalized;
            run(job);
            const std::string size = std::to_string(from.height) + " x " + std::to_string(from.width);
            expect(near(found, wanted, normalized), "the kernel within one level of the processor, " + size);
            neck::Tensor other = pixels;
            std::fill(other.data.begin(), other.data.end(), std::byte{60});
            expect(!near(neck::Preprocessor(input, 2).prepare(other).image, wanted, normalized),
                   "the control, " + size);
        }
    }
}
