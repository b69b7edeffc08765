// What the programs here test with.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include "neck/error.hpp"
#include "neck/tensor.hpp"

inline std::atomic<int> failures{0};

inline void expect(bool right, const std::string& what) {
    if (!right) {
        std::cerr << "not so: " << what << "\n";
        ++failures;
    }
}

inline void expect_error(const std::function<void()>& call, const std::string& part) {
    try {
        call();
        expect(false, "an error with '" + part + "'");
    } catch (const neck::Error& error) {
        expect(std::string(error.what()).find(part) != std::string::npos, "'" + part + "' in '" + error.what() + "'");
    }
}

inline neck::Tensor image_of(std::int64_t batch, float value) {
    neck::Tensor image{"image", neck::DataType::float32, {batch, 3, 2, 2}};
    const std::vector<float> values(static_cast<std::size_t>(batch) * 12, value);
    const auto* begin = reinterpret_cast<const std::byte*>(values.data());
    image.data.assign(begin, begin + values.size() * sizeof(float));
    return image;
}

/// The fake gives 2 * value + 0.25 for the second output.
inline bool doubled(const std::vector<neck::Tensor>& outputs, std::int64_t batch, float value) {
    bool right = outputs.size() == 2;
    for (std::size_t index = 0; right && index < 2; ++index) {
        right = outputs[index].shape == neck::Shape{batch, 5, 2, 2};
        for (const float found : outputs[index].to_floats()) {
            right = right && found == 2 * value + 0.25F * static_cast<float>(index);
        }
    }
    return right;
}
