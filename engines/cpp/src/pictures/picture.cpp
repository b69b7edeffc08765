#include "neck/picture.hpp"

#include <system_error>
#include <utility>

#include "pictures/decode.hpp"
#include "files/files.hpp"
#include "neck/error.hpp"

namespace neck {
namespace {

MappedFile open_picture(const std::filesystem::path& path) {
    try {
        return MappedFile(path);
    } catch (const std::system_error& error) {
        throw Error(path.string() + " cannot be opened (" + error.code().message() +
                    "); check the path and its permissions.");
    }
}

}  // namespace

Tensor read_picture(const std::filesystem::path& path) {
    const MappedFile file = open_picture(path);
    try {
        Pixels pixels = decode(file.text());
        return {"pixels", DataType::uint8, {1, pixels.size.height, pixels.size.width, 3}, std::move(pixels.data)};
    } catch (const PictureFault& fault) {
        throw Error(path.string() + " " + fault.what() + ".");
    }
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
