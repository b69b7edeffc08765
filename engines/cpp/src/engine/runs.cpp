#include <algorithm>
#include <cstdint>
#include <mutex>
#include <utility>

#include "gpu/device_resize.hpp"
#include "engine/engine_impl.hpp"
#include "plan/flavor.hpp"
#include "files/text.hpp"

namespace neck {
namespace {

constexpr int warm_up_runs = 3;  // before a CUDA graph is captured: RTX compiles its kernels in the first run

nvinfer1::Dims dims_of(const Shape& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

}  // namespace

void Engine::Impl::check_batch(const std::string& got, std::int64_t batch) const {
    if (batch < input().smallest_batch || batch > largest_batch_) {
        Port takes = input();
        takes.largest_batch = largest_batch_;
        throw Error(plan_ + ": the input " + takes.name + " is " + got + ", but it must be " + takes.describe());
    }
}

void Engine::Impl::wait_before(cudaStream_t stream) {
    check(cudaStreamWaitEvent(stream, done_.get(), 0),
          plan_ + ": the CUDA stream could not be made to wait for the previous run");
}

void Engine::Impl::mark_after(cudaStream_t stream) {
    check(cudaEventRecord(done_.get(), stream), plan_ + ": recording a CUDA event on the stream failed");
}

void Engine::Impl::copy_in(const Tensor& image, cudaStream_t stream) {
    const Port& port = input();
    const Shape expected = image.shape.empty() ? Shape() : port.at(image.shape[0]);
    if (image.type != port.type || image.shape != expected || image.data.size() != bytes_of(image.type, image.shape)) {
        throw Error(plan_ + ": the input " + port.name + " is " + image.describe() + ", but it must be " +
                    port.describe());
    }
    check_batch(image.describe(), image.shape[0]);
    const DeviceGuard guard(options_.device, plan_);
    wait_before(stream);
    check(cudaMemcpyAsync(input_.get(), image.data.data(), image.data.size(), cudaMemcpyHostToDevice, stream),
          plan_ + ": copying the input to the GPU failed");
    mark_after(stream);
}

Fit Engine::Impl::copy_in_rgb8(const void* pixels, Size size, std::size_t pitch, cudaStream_t stream,
                               std::int64_t entry) {
    const Size wanted = image_size(input());
    if (size.height < 1 || size.width < 1) {
        throw Error(plan_ + ": the image for copy_in_rgb8 has the height " + std::to_string(size.height) +
                    " and the width " + std::to_string(size.width) +
                    ". Pass an image whose height and width are at least 1 pixel");
    }
    const std::size_t row_bytes = static_cast<std::size_t>(size.width) * 3;
    if (pitch < row_bytes) {
        throw Error(plan_ + ": the pitch for copy_in_rgb8 is " + std::to_string(pitch) + " bytes, but a row of " +
                    std::to_string(size.width) + " RGB pixels has " + std::to_string(row_bytes) +
                    " bytes. Pass a pitch of at least " + std::to_string(row_bytes) + " bytes");
    }
    if (entry < 0 || entry >= largest_batch_) {
        throw Error(plan_ + ": copy_in_rgb8 was called with the batch index " + std::to_string(entry) +
                    ", but the engine's largest batch size is " + std::to_string(largest_batch_) +
                    ". Set the argument 'entry' of copy_in_rgb8 to an index from 0 to " +
                    std::to_string(largest_batch_ - 1));
    }
    const DeviceGuard guard(options_.device, plan_);
    check_device_memory(pixels, options_.device, plan_, "the image");
    DeviceResize job{static_cast<const std::uint8_t*>(pixels), size.height, size.width, pitch};
    job.target = input_.get() + static_cast<std::size_t>(entry) * bytes_of(input().type, input().at(1));
    job.target_height = wanted.height;
    job.target_width = wanted.width;
    job.normalized = input().type == DataType::float32;
    wait_before(stream);
    const cudaError_t launched = launch_resize(job, stream);
    if (launched == cudaErrorNotSupported) {
        throw Error(plan_ +
                    ": this library cannot resize images on the GPU, because it was built without nvcc; build it with "
                    "nvcc, or resize the image on the CPU with neck::Preprocessor");
    }
    check(launched, plan_ + ": the input image could not be resized on the GPU because of the following CUDA error");
    mark_after(stream);
    return fit_of(size, wanted);
}

void Engine::Impl::bind(nvinfer1::IExecutionContext& context, std::int64_t batch, const void* image) {
    const Port& port = input();
    if (!context.setInputShape(port.name.c_str(), dims_of(port.at(batch)))) {
        throw Error(plan_ + ": TensorRT rejected the shape " + to_text(port.at(batch)) + " of the input " + port.name +
                    " (" + loaded_->logger->failure() + "); pass an input with this name, type and shape: " +
                    port.describe());
    }
    // TensorRT's interface takes no pointer to const; it only reads an input
    bool bound = context.setTensorAddress(port.name.c_str(), const_cast<void*>(image));  // NOLINT
    for (std::size_t index = 0; index < output_.size(); ++index) {
        bound = context.setTensorAddress(outputs()[index].name.c_str(), output_[index].address()) && bound;
    }
    if (!bound) {
        throw Error(plan_ + ": TensorRT rejected the address of an input or output (" + loaded_->logger->failure() +
                    "); use device memory that is aligned to 256 bytes");
    }
}

void Engine::Impl::run(nvinfer1::IExecutionContext& context, cudaStream_t stream) {
    if (!context.enqueueV3(stream)) {
        cudaGetLastError();
        throw GpuError(plan_ + ": the run failed (" + loaded_->logger->failure() + "); " + memory_text());
    }
}

/// Captures the run of a batch. It has a context of its own: what a graph was captured from must not change later.
Prepared& Engine::Impl::captured(std::int64_t batch) {
    const auto found = graphs_.find(batch);
    if (found != graphs_.end()) {
        return found->second;
    }
    const cudaStream_t stream = capture_stream_.get();
    Prepared prepared{make_context(*loaded_, scratch_.get(), scratch_bytes_, plan_), nullptr};
    bind(*prepared.context, batch, input_.get());
    wait_before(stream);
    for (int index = 0; index < warm_up_runs; ++index) {
        run(*prepared.context, stream);
    }
    check(cudaStreamSynchronize(stream),
          plan_ + ": CUDA reported an error in a warm-up run, so no CUDA graph was captured");
    const auto succeed = [&](cudaError_t code) {
        if (code != cudaSuccess) {
            cudaGetLastError();
            throw GpuError(plan_ + ": the CUDA graph cannot be captured (" + cudaGetErrorString(code) +
                           "); run the plan without a CUDA graph (leave out --graph, or set EngineOptions::cuda_graph "
                           "to "
                           "false)");
        }
    };
    if (!is_capturable(*prepared.context, stream)) {
        throw Error(plan_ +
                    ": TensorRT-RTX reports that no CUDA graph of this plan can be captured; run the plan without a "
                    "CUDA "
                    "graph (leave out --graph, or set EngineOptions::cuda_graph to false)");
    }
    succeed(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    const bool ran = prepared.context->enqueueV3(stream);
    cudaGraph_t raw = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(stream, &raw);  // always: the stream is of no use before
    const OwnedGraph graph(raw);
    succeed(ran ? ended : ended != cudaSuccess ? ended : cudaErrorStreamCaptureUnsupported);
    cudaGraphExec_t exec = nullptr;
    succeed(cudaGraphInstantiateWithFlags(&exec, graph.get(), 0));
    prepared.graph.reset(exec);
    return graphs_.emplace(batch, std::move(prepared)).first->second;
}

void Engine::Impl::enqueue(std::int64_t batch, cudaStream_t stream, const void* image) {
    check_batch(std::string(name_of(input().type)) + " " + to_text(input().at(batch)), batch);
    const DeviceGuard guard(options_.device, plan_);
    Prepared* const prepared = options_.cuda_graph ? &captured(batch) : nullptr;
    wait_before(stream);
    if (image == nullptr) {
        image = input_.get();
    } else if (image != input_.get() && (prepared || reinterpret_cast<std::uintptr_t>(image) % alignment != 0)) {
        const std::size_t bytes = bytes_of(input().type, input().at(batch));
        check(cudaMemcpyAsync(input_.get(), image, bytes, cudaMemcpyDeviceToDevice, stream),
              plan_ + ": copying the input from one GPU buffer to another failed");
        image = input_.get();
    }
    if (prepared) {
        check(cudaGraphLaunch(prepared->graph.get(), stream), plan_ + ": CUDA could not launch the plan's CUDA graph");
    } else {
        bind(*context_, batch, image);
        run(*context_, stream);
    }
    last_batch_ = batch;
    mark_after(stream);
    keep_kernels(batch);
}

/// Writes what the first run of a batch size compiled, so that a process that is killed later leaves it.
void Engine::Impl::keep_kernels(std::int64_t batch) {
    if (!loaded_->config.cache || !compiled_.insert(batch).second) {
        return;
    }
    const std::lock_guard<std::mutex> lock(loaded_->making);
    const std::string failed = cache_.write(cached_kernels(loaded_->config));
    if (!failed.empty()) {
        warn(failed);
    }
}

std::vector<DeviceTensor> Engine::Impl::device_outputs() const {
    if (last_batch_ == 0) {
        throw Error(plan_ + ": there are no outputs before the first run; call enqueue first");
    }
    std::vector<DeviceTensor> tensors;
    for (std::size_t index = 0; index < output_.size(); ++index) {
        const Port& port = outputs()[index];
        const Shape shape = port.shape[0] < 0 ? port.at(last_batch_) : port.shape;
        tensors.push_back({port.name, port.type, shape, output_[index].address(), bytes_of(port.type, shape)});
    }
    return tensors;
}

std::vector<Tensor> Engine::Impl::copy_out(cudaStream_t stream) {
    const DeviceGuard guard(options_.device, plan_);
    const std::vector<DeviceTensor> found = device_outputs();
    wait_before(stream);
    std::vector<Tensor> tensors;
    for (const DeviceTensor& output : found) {
        Tensor tensor{output.name, output.type, output.shape, std::vector<std::byte>(output.bytes)};
        check(cudaMemcpyAsync(tensor.data.data(), output.data, output.bytes, cudaMemcpyDeviceToHost, stream),
              plan_ + ": copying the outputs to the host failed");
        tensors.push_back(std::move(tensor));
    }
    mark_after(stream);
    check(cudaStreamSynchronize(stream),
          plan_ + ": CUDA reported an error while the GPU ran the plan or copied the outputs to the host");
    return tensors;
}

}  // namespace neck
