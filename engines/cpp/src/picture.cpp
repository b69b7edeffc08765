#include "neck/picture.hpp"

#include <cstring>
#include <system_error>

#include "decode.hpp"
#include "files.hpp"
#include "neck/error.hpp"
#include "text.hpp"

namespace neck {
namespace {

// float32(2 / 255), then two roundings: pixel * scale, less 1; neck/pictures.py says why
constexpr float pixel_scale = static_cast<float>(2.0 / 255.0);

MappedFile open_picture(const std::filesystem::path& path) {
    try {
        return MappedFile(path);
    } catch (const std::system_error& error) {
        throw Error(path.string() + " cannot be opened (" + error.code().message() +
                    "); check the path and its permissions.");
    }
}

std::string to_text(Size size) { return std::to_string(size.height) + " x " + std::to_string(size.width); }

}  // namespace

Tensor read_picture(const std::filesystem::path& path, Size wanted) {
    const MappedFile file = open_picture(path);
    const auto check = [&](Size found) {
        if (found.height != wanted.height || found.width != wanted.width) {
            throw PictureFault("is " + to_text(found) + " pixels (height x width), the model takes " + to_text(wanted) +
                               "; resize it as SAM 3 does: neck.pictures.resize_picture, bilinear with antialias");
        }
    };
    try {
        return {"pixels", DataType::uint8, {1, wanted.height, wanted.width, 3}, decode(file.text(), check).data};
    } catch (const PictureFault& fault) {
        throw Error(path.string() + " " + fault.what() + ".");
    }
}

Tensor normalise(const Tensor& pixels) {
    if (pixels.type != DataType::uint8 || pixels.shape.size() != 4 || pixels.shape[3] != 3 ||
        pixels.data.size() != bytes_of(pixels.type, pixels.shape)) {
        throw Error("Pixels are " + pixels.describe() + "; give uint8 (B, H, W, 3), RGB, not empty.");
    }
    const auto batch = static_cast<std::size_t>(pixels.shape[0]);
    const std::size_t area = static_cast<std::size_t>(pixels.shape[1]) * static_cast<std::size_t>(pixels.shape[2]);
    Tensor image{"image", DataType::float32, {pixels.shape[0], 3, pixels.shape[1], pixels.shape[2]}, {}};
    image.data.resize(pixels.data.size() * sizeof(float));
    std::byte* target = image.data.data();
    for (std::size_t entry = 0; entry < batch; ++entry) {
        for (std::size_t channel = 0; channel < 3; ++channel) {
            for (std::size_t pixel = 0; pixel < area; ++pixel, target += sizeof(float)) {  // (H, W, 3) -> (3, H, W)
                const auto level = std::to_integer<std::uint8_t>(pixels.data[(entry * area + pixel) * 3 + channel]);
                const float scaled = static_cast<float>(level) * pixel_scale;
                const float value = scaled - 1.0F;
                std::memcpy(target, &value, sizeof value);
            }
        }
    }
    return image;
}

Size picture_size(const Port& input) {
    const Shape& shape = input.shape;
    if (shape.size() == 4 && input.type == DataType::uint8 && shape[3] == 3 && shape[1] > 0 && shape[2] > 0) {
        return {shape[1], shape[2]};
    }
    if (shape.size() == 4 && input.type == DataType::float32 && shape[1] == 3 && shape[2] > 0 && shape[3] > 0) {
        return {shape[2], shape[3]};
    }
    throw Error("the model takes " + input.describe() +
                ", no picture; expected float32 (B, 3, H, W) or uint8 (B, H, W, 3)");
}

Tensor prepare(const Tensor& pixels, const Port& input) {
    const Size size = picture_size(input);
    if (pixels.shape.size() != 4 || pixels.shape[1] != size.height || pixels.shape[2] != size.width) {
        throw Error("Pixels are " + pixels.describe() + "; the model takes " + to_text(size) + " (height x width)");
    }
    Tensor image = input.type == DataType::uint8 ? pixels : normalise(pixels);
    image.name = input.name;
    return image;
}

Tensor repeat(const Tensor& tensor, std::int64_t count) {
    Tensor many{tensor.name, tensor.type, tensor.shape, {}};
    many.shape.at(0) *= count;
    many.data.reserve(bytes_of(many.type, many.shape));
    for (std::int64_t index = 0; index < count; ++index) {
        many.data.insert(many.data.end(), tensor.data.begin(), tensor.data.end());
    }
    return many;
}

}  // namespace neck
