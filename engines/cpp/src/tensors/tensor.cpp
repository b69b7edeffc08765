#include "neck/tensor.hpp"

#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "files/guard.hpp"
#include "files/text.hpp"
#include "neck/error.hpp"
#include "tensors/type_names.hpp"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "this library needs a little-endian machine: it reads and sends tensors as they lie in memory");

namespace neck {
namespace {

constexpr TypeNames numpy_names{"float32", "float16", "bfloat16", "uint8", "int32", "int64"};
constexpr std::array<std::size_t, 6> sizes{4, 2, 2, 1, 4, 8};

float float_of(std::uint32_t bits) {
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename Element, typename Convert>
void convert(const std::vector<std::byte>& data, std::vector<float>& floats, Convert to_float) {
    for (std::size_t index = 0; index < floats.size(); ++index) {
        Element element{};
        std::memcpy(&element, data.data() + index * sizeof element, sizeof element);
        floats[index] = to_float(element);
    }
}

std::string join_sides(const Shape& shape, std::size_t from) {
    std::string text;
    for (std::size_t index = from; index < shape.size(); ++index) {
        text += (index ? ", " : "") + std::to_string(shape[index]);
    }
    return text;
}

}  // namespace

std::string_view name_of(DataType type) { return name_in(numpy_names, type); }

std::size_t size_of(DataType type) { return sizes.at(static_cast<std::size_t>(type)); }

std::optional<DataType> type_of(std::string_view name) { return type_in(numpy_names, name); }

std::string to_text(const Shape& shape) { return "(" + join_sides(shape, 0) + (shape.size() == 1 ? ",)" : ")"); }

std::size_t bytes_of(DataType type, const Shape& shape) {
    std::uint64_t bytes = size_of(type);
    for (const std::int64_t side : shape) {
        if (side < 0 || __builtin_mul_overflow(bytes, static_cast<std::uint64_t>(side), &bytes) ||
            bytes > std::uint64_t{std::numeric_limits<std::int64_t>::max()}) {
            throw Error("a " + std::string(name_of(type)) + " tensor cannot have the shape " + to_text(shape) +
                        "; no dimension may be negative, and the tensor must be smaller than 2^63 bytes");
        }
    }
    return bytes;
}

float half_to_float(std::uint16_t bits) {
    const std::uint32_t sign = (bits & 0x8000U) << 16U;
    const std::uint32_t exponent = (bits >> 10U) & 0x1fU;
    const std::uint32_t fraction = bits & 0x3ffU;
    if (exponent == 31) {  // infinity, or not a number
        return float_of(sign | 0x7f800000U | fraction << 13U);
    }
    if (exponent == 0) {  // subnormal: fraction * 2^-24, exact in float
        const float value = static_cast<float>(fraction) * 0x1p-24F;
        return sign ? -value : value;
    }
    return float_of(sign | (exponent + 112U) << 23U | fraction << 13U);
}

Tensor::Tensor(std::string name_, DataType type_, Shape shape_, std::vector<std::byte> data_)
    : name(std::move(name_)), type(type_), shape(std::move(shape_)), data(std::move(data_)) {
    if (!data.empty()) {
        guarded(name, [&] { check(); });
    }
}

Tensor::Tensor(std::string name_, DataType type_, Shape shape_)
    : name(std::move(name_)), type(type_), shape(std::move(shape_)) {
    guarded(name, [&] { data.resize(bytes_of(type, shape)); });
}

void Tensor::check() const {
    if (data.size() != bytes_of(type, shape)) {
        throw Error("tensor " + repr(name) + " has " + std::to_string(data.size()) + " bytes, but " + describe() +
                    " needs " + std::to_string(bytes_of(type, shape)) + "; pass data that match the shape");
    }
}

std::string Tensor::describe() const { return std::string(name_of(type)) + " " + to_text(shape); }

std::vector<float> Tensor::to_floats() const {
    std::vector<float> floats = guarded(name, [&] { return std::vector<float>(data.size() / size_of(type)); });
    switch (type) {
        case DataType::float32:
            convert<float>(data, floats, [](float value) { return value; });
            break;
        case DataType::float16:
            convert<std::uint16_t>(data, floats, half_to_float);
            break;
        case DataType::bfloat16:
            convert<std::uint16_t>(data, floats,
                                   [](std::uint16_t bits) { return float_of(std::uint32_t{bits} << 16U); });
            break;
        case DataType::uint8:
            convert<std::uint8_t>(data, floats, [](std::uint8_t value) { return static_cast<float>(value); });
            break;
        case DataType::int32:
            convert<std::int32_t>(data, floats, [](std::int32_t value) { return static_cast<float>(value); });
            break;
        case DataType::int64:
            convert<std::int64_t>(data, floats, [](std::int64_t value) { return static_cast<float>(value); });
            break;
    }
    return floats;
}

Tensor Tensor::slice(std::int64_t first, std::int64_t count) const {
    if (shape.empty() || first < 0 || count < 1 || first > shape[0] - count) {
        throw Error("tensor " + repr(name) + " does not contain all of the requested batch entries " +
                    std::to_string(first) + " to " + std::to_string(first + count - 1) + ". The tensor is " +
                    describe() +
                    ", the first dimension of the tensor is the batch, and batch entries are counted from 0. Request "
                    "only entries that the tensor contains");
    }
    return guarded(name, [&] {
        check();
        const std::size_t each = data.size() / static_cast<std::size_t>(shape[0]);
        const auto begin = data.begin() + static_cast<std::ptrdiff_t>(each * static_cast<std::size_t>(first));
        Shape sides = shape;
        sides[0] = count;
        return Tensor(name, type, sides,
                      {begin, begin + static_cast<std::ptrdiff_t>(each * static_cast<std::size_t>(count))});
    });
}

std::string Port::describe() const {
    std::string batch = std::to_string(smallest_batch);
    if (smallest_batch != largest_batch) {
        batch += " to " + std::to_string(largest_batch);
    }
    return name + ": " + std::string(name_of(type)) + " (" + batch + join_sides(shape, 1) + ")";
}

Shape Port::at(std::int64_t batch) const {
    Shape sides = shape;
    if (!sides.empty()) {
        sides[0] = batch;
    }
    return sides;
}

}  // namespace neck
