#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>

#include "fake.hpp"

namespace fake {

std::size_t elements(const std::vector<std::int64_t>& shape) {
    std::size_t product = 1;
    for (const std::int64_t side : shape) {
        product *= static_cast<std::size_t>(side);
    }
    return product;
}

std::size_t element_size(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kHALF:
        case nvinfer1::DataType::kBF16:
            return 2;
        case nvinfer1::DataType::kINT8:
        case nvinfer1::DataType::kUINT8:
            return 1;
        case nvinfer1::DataType::kINT64:
            return 8;
        default:
            return 4;
    }
}

namespace {

/// Output = 2 * input + 0 .. 1 by its place among the outputs, the input repeated or cut to the output's size.
class Doubling : public Program {
public:
    void run(const std::map<std::string, Bound>& bound) const override {
        const TensorFacts& image = tensors.front();
        const Bound& from = bound.at(image.name);
        const std::size_t batch = static_cast<std::size_t>(from.shape[0]);
        const std::size_t each = elements(from.shape) / batch;
        const char* nudge = std::getenv("STAND_IN_NUDGE");
        for (std::size_t index = 1; index < tensors.size(); ++index) {
            const Bound& to = bound.at(tensors[index].name);
            const std::size_t count = elements(to.shape) / batch;
            const float added = 0.25F * static_cast<float>(index - 1) + (nudge ? std::strtof(nudge, nullptr) : 0.0F);
            for (std::size_t place = 0; place < batch * count; ++place) {
                const std::size_t source = place / count * each + place % count % each;
                write(to.data, tensors[index].type, place, 2 * read(from.data, image.type, source) + added);
            }
        }
    }

private:
    static float read(const void* data, nvinfer1::DataType type, std::size_t place) {
        return type == nvinfer1::DataType::kUINT8 ? static_cast<const std::uint8_t*>(data)[place]
                                                  : static_cast<const float*>(data)[place];
    }

    /// The half that is nearest; ties to even. Clang 14 has no _Float16 on x86-64.
    static std::uint16_t half_of(float value) {
        std::uint32_t bits = 0;
        std::memcpy(&bits, &value, sizeof bits);
        const auto sign = static_cast<std::uint16_t>(bits >> 16U & 0x8000U);
        const float size = std::fabs(value);
        if (!(size < 65520.0F)) {
            return static_cast<std::uint16_t>(sign | (std::isnan(value) ? 0x7e00U : 0x7c00U));
        }
        const int exponent = std::max(-14, size > 0 ? std::ilogb(size) : -14);
        const auto steps = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));
        return static_cast<std::uint16_t>(sign | (static_cast<std::uint32_t>(exponent + 14) * 1024U + steps));
    }

    static void write(void* data, nvinfer1::DataType type, std::size_t place, float value) {
        if (type == nvinfer1::DataType::kHALF) {
            static_cast<std::uint16_t*>(data)[place] = half_of(value);
        } else if (type == nvinfer1::DataType::kBF16) {
            std::uint32_t bits = 0;
            std::memcpy(&bits, &value, sizeof bits);
            static_cast<std::uint16_t*>(data)[place] = static_cast<std::uint16_t>(bits >> 16U);
        } else {
            static_cast<float*>(data)[place] = value;
        }
    }
};

nvinfer1::DataType type_named(const std::string& name) {
    const std::map<std::string, nvinfer1::DataType> names{
        {"float32", nvinfer1::DataType::kFLOAT}, {"float16", nvinfer1::DataType::kHALF},
        {"bfloat16", nvinfer1::DataType::kBF16}, {"uint8", nvinfer1::DataType::kUINT8},
        {"int8", nvinfer1::DataType::kINT8},     {"int32", nvinfer1::DataType::kINT32}};
    return names.at(name);
}

std::vector<std::int64_t> numbers(const std::string& text) {
    std::vector<std::int64_t> found;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) {
        found.push_back(std::stoll(part));
    }
    return found;
}

}  // namespace

/// `fake`, then lines `input NAME TYPE SHAPE [BATCHES]`, `output NAME TYPE SHAPE`, `scratch BYTES`, `warn TEXT`,
/// `lean`, `allocates`. What begins with TensorRT-RTX's `vtrt` is its plan.
std::unique_ptr<Program> read_program(std::string_view plan) {
    std::istringstream stream{std::string(plan)};
    std::string first;
    std::getline(stream, first);
    if (first.find("fake") == std::string::npos) {
        return read_onnx(plan);
    }
    auto program = std::make_unique<Doubling>();
    program->rtx = first.rfind("vtrt", 0) == 0;
    for (std::string line; std::getline(stream, line);) {
        std::istringstream words(line);
        std::string kind, name, type, shape, batch;
        words >> kind >> name >> type >> shape >> batch;
        if (kind == "scratch") {
            program->scratch = std::stoll(name);
        } else if (kind == "lean") {
            program->lean = true;
        } else if (kind == "allocates") {
            program->allocates = true;
        } else if (kind == "warn") {
            program->warning = line.substr(5);
        } else {
            TensorFacts tensor{name, type_named(type), kind == "input", numbers(shape)};
            if (!batch.empty()) {
                tensor.batch = numbers(batch);
            }
            program->tensors.push_back(tensor);
        }
    }
    return program;
}

#ifndef STAND_IN_ONNX
std::unique_ptr<Program> read_onnx(std::string_view /*plan*/) { return nullptr; }
#endif

}  // namespace fake
