#include "neck/reference.hpp"

#include <utility>

#include "neck/error.hpp"
#include "neck/safetensors.hpp"

namespace neck {

Reference read_reference(const std::filesystem::path& path) {
    const auto fault = [&](const std::string& why) {
        return Error(path.string() + ": " + why +
                     ". Write a new reference with `neck-export verify --save-reference`");
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
            "the file is not a reference that outputs can be compared with. A reference contains the images as a uint8 "
            "tensor `pixels` of shape (B, H, W, 3), and at least one float32 output of the model");
    }
    for (const Tensor& output : reference.outputs) {
        if (output.shape[0] != pixels.shape[0]) {
            throw fault(
                "the number of images, which is the first dimension, must be the same in all tensors of the reference. "
                "The output `" +
                output.name + "` has the shape " + to_text(output.shape) + ", but the tensor `pixels` has the shape " +
                to_text(pixels.shape));
        }
    }
    return reference;
}

}  // namespace neck
