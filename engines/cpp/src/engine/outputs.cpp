// Outputs on the GPU: in the engine's memory or the caller's, and handed over without a copy.
#include <algorithm>
#include <cstdint>
#include <utility>

#include "engine/engine_impl.hpp"
#include "files/text.hpp"

namespace neck {
namespace {

/// What a tensor that was handed over keeps alive.
struct Handed {
    dlpack::Managed managed;
    Shape shape;
    std::shared_ptr<std::byte> memory;
};

dlpack::Type dlpack_type(DataType type) {
    const auto bits = static_cast<std::uint8_t>(size_of(type) * 8);
    switch (type) {
        case DataType::uint8:
            return {1, bits};
        case DataType::int32:
        case DataType::int64:
            return {0, bits};
        case DataType::bfloat16:
            return {4, bits};
        default:
            return {2, bits};
    }
}

}  // namespace

std::size_t Engine::Impl::most_bytes(const Port& output) const {
    return bytes_of(output.type, output.shape[0] < 0 ? output.at(largest_batch_) : output.shape);
}

std::size_t Engine::Impl::find_output(const std::string& name) const {
    const auto found =
        std::find_if(outputs().begin(), outputs().end(), [&](const Port& port) { return port.name == name; });
    if (found == outputs().end()) {
        throw Error(plan_ + ": the plan has no output " + repr(name) + "; choose one of " +
                    joined(outputs(), [](const Port& port) { return port.name; }));
    }
    return static_cast<std::size_t>(found - outputs().begin());
}

void Engine::Impl::bind_output(const std::string& name, void* memory, std::size_t bytes) {
    Output& output = output_[find_output(name)];
    const std::size_t needed = most_bytes(outputs()[find_output(name)]);
    const DeviceGuard guard(options_.device, plan_);
    if (memory != nullptr) {
        if (bytes < needed) {
            throw Error(plan_ + ": the memory that was passed to bind_output for the output " + name + " has only " +
                        std::to_string(bytes) + " bytes, but the largest batch size " +
                        std::to_string(largest_batch_) + " needs " + std::to_string(needed) +
                        " bytes. Pass memory of at least " + std::to_string(needed) + " bytes");
        }
        if (reinterpret_cast<std::uintptr_t>(memory) % alignment != 0) {
            throw Error(plan_ + ": the memory for output " + name + " is not aligned to " + std::to_string(alignment) +
                        " bytes; use memory from cudaMalloc");
        }
        check_device_memory(memory, options_.device, plan_, "output " + name);
    }
    check(cudaEventSynchronize(done_.get()),
          plan_ + ": a CUDA error occurred during the previous run of the plan, or while an input was copied to the "
                  "GPU");
    graphs_.clear();  // their addresses are fixed
    output.bound = memory;
    last_batch_ = 0;
}

void Engine::Impl::unbind_outputs() noexcept {
    if (std::none_of(output_.begin(), output_.end(), [](const Output& output) { return output.bound != nullptr; })) {
        return;
    }
    cudaEventSynchronize(done_.get());  // the last run may still be writing there
    graphs_.clear();
    for (Output& output : output_) {
        output.bound = nullptr;
    }
    last_batch_ = 0;
}

dlpack::Managed* Engine::Impl::to_dlpack(const std::string& name) const {
    const std::size_t index = find_output(name);
    const DeviceTensor tensor = device_outputs()[index];
    auto handed = std::make_unique<Handed>();
    handed->shape = tensor.shape;
    if (output_[index].bound == nullptr) {
        handed->memory = output_[index].own;
    }
    dlpack::Tensor& view = handed->managed.dl_tensor;
    view.data = output_[index].address();
    view.device.id = options_.device;
    view.ndim = static_cast<std::int32_t>(handed->shape.size());
    view.dtype = dlpack_type(tensor.type);
    view.shape = handed->shape.data();
    handed->managed.manager_ctx = handed.get();
    handed->managed.deleter = [](dlpack::Managed* self) { delete static_cast<Handed*>(self->manager_ctx); };
    return &handed.release()->managed;
}

}  // namespace neck
