#include "neck/reference.hpp"

#include <utility>

#include "neck/error.hpp"
#include "neck/safetensors.hpp"

namespace neck {

Reference read_reference(const std::filesystem::path& path) {
    const auto fault = [&](const std::string& why) {
        return Error(path.string() + ": " + why + "; write a new reference with `neck-export verify --save-reference`");
    };
    Reference reference;
    bool found = false;
    for (Tensor& tensor : read_safetensors(path)) {
        if (tensor.name == "pixels") {
            reference.pixels = std::move(tensor);
            found = true;
        } else if (tensor.type == DataType::float32 && !tensor.shape.empty()) {
            reference.outputs.push_back(std::move(tensor));
        }
    }
    const Tensor& pixels = reference.pixels;
    if (!found || pixels.type != DataType::uint8 || pixels.shape.size() != 4 || pixels.data.empty() ||
        pixels.shape[3] != 3 || reference.outputs.empty()) {
        throw fault(
            "the file is not a reference; it must contain the images as uint8 `pixels` (B, H, W, 3), and at least one "
            "output in float32");
    }
    for (const Tensor& output : reference.outputs) {
        if (output.shape[0] != pixels.shape[0]) {
            throw fault("the numbers of images in `" + output.name + "` " + to_text(output.shape) + " and `pixels` " +
                        to_text(pixels.shape) + " differ");
        }
    }
    return reference;
}

}  // namespace neck
