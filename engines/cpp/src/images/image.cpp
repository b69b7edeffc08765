#include "neck/image.hpp"

#include <string_view>
#include <system_error>
#include <utility>

#include "files/files.hpp"
#include "files/guard.hpp"
#include "files/log.hpp"
#include "neck/error.hpp"
#include "images/decode.hpp"

namespace neck {
namespace {

constexpr std::size_t largest_file = std::size_t{1} << 31U;

Tensor decode_named(std::string_view file, const ImageLimits& limits, const std::string& name) {
    if (limits.most_pixels < 1 || limits.most_scans < 1) {
        throw Error("ImageLimits::most_pixels is " + std::to_string(limits.most_pixels) +
                    " and ImageLimits::most_scans is " + std::to_string(limits.most_scans) +
                    "; set both limits to 1 or more");
    }
    try {
        Pixels pixels = decode(file, limits);
        if (!pixels.warning.empty()) {
            log_line(LogLevel::warning, name + ": " + pixels.warning);
        }
        return {"pixels", DataType::uint8, {1, pixels.size.height, pixels.size.width, 3}, std::move(pixels.data)};
    } catch (const ImageFault& fault) {
        throw Error(name + ": " + fault.what());
    }
}

}  // namespace

Tensor read_image(const std::filesystem::path& path, const ImageLimits& limits) {
    return guarded(path, [&] {
        try {
            return decode_named(read_file(path, largest_file).text(), limits, path.string());
        } catch (const std::system_error& error) {
            throw Error(path.string() + ": the image cannot be opened (" + error.code().message() +
                        "); check the path and its permissions");
        }
    });
}

Tensor decode_image(const void* data, std::size_t bytes, const ImageLimits& limits, const std::string& name) {
    return guarded(name, [&] {
        if (data == nullptr && bytes > 0) {
            throw Error(name + ": the image cannot be decoded, because the given size is " + std::to_string(bytes) +
                        " bytes, but the given pointer is null; pass a pointer to the content of a PNG or JPEG file");
        }
        return decode_named({static_cast<const char*>(data), bytes}, limits, name);
    });
}

Size image_size(const Port& input) {
    const Shape& shape = input.shape;
    if (shape.size() == 4 && input.type == DataType::uint8 && shape[3] == 3 && shape[1] > 0 && shape[2] > 0) {
        return {shape[1], shape[2]};
    }
    if (shape.size() == 4 && input.type == DataType::float32 && shape[1] == 3 && shape[2] > 0 && shape[3] > 0) {
        return {shape[2], shape[3]};
    }
    throw Error("the model's input is " + input.describe() +
                ", which is not an image; use a model whose input is float32 (B, 3, H, W) or uint8 (B, H, W, 3)");
}

Tensor repeat(const Tensor& tensor, std::int64_t count) {
    return guarded(tensor.name, [&] {
        tensor.check();
        if (tensor.shape.empty() || count < 1) {
            throw Error("tensor " + repr(tensor.name) + " (" + tensor.describe() + ") cannot be repeated " +
                        std::to_string(count) + " times; the tensor needs a batch dimension, and the number of "
                        "repetitions must be at least 1");
        }
        Shape shape = tensor.shape;
        if (__builtin_mul_overflow(shape[0], count, &shape[0])) {
            shape[0] = -1;  // what bytes_of refuses
        }
        std::vector<std::byte> data;
        data.reserve(bytes_of(tensor.type, shape));
        for (std::int64_t index = 0; index < count; ++index) {
            data.insert(data.end(), tensor.data.begin(), tensor.data.end());
        }
        return Tensor{tensor.name, tensor.type, shape, std::move(data)};
    });
}

}  // namespace neck
