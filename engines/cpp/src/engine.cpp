#include "neck/engine.hpp"

#include <map>
#include <optional>
#include <string>
#include <utility>

#include "checks.hpp"
#include "cuda.hpp"
#include "runtime.hpp"
#include "text.hpp"

namespace neck {
namespace {

constexpr int warm_up_runs = 3;  // before a CUDA graph is captured: RTX compiles its kernels in the first run

/// A context at one batch size, and the CUDA graph of its run where graphs are asked for.
struct Prepared {
    std::unique_ptr<nvinfer1::IExecutionContext> context;
    OwnedGraphExec graph;
};

nvinfer1::Dims dims_of(const Shape& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

}  // namespace

class Engine::Impl {
public:
    Impl(const std::filesystem::path& plan, const EngineOptions& options);
    ~Impl();
    Impl(const Impl&) = delete;
    Impl& operator=(const Impl&) = delete;

    void copy_in(const Tensor& image, cudaStream_t stream);
    void enqueue(std::int64_t batch, cudaStream_t stream, const void* image);
    std::vector<DeviceTensor> device_outputs() const;
    std::vector<Tensor> copy_out(cudaStream_t stream);

    Manifest manifest;
    std::string runtime;
    std::vector<std::string> warnings;
    std::size_t loaded_bytes = 0;
    const Port& input() const { return loaded_.inputs[0]; }
    const std::vector<Port>& outputs() const { return loaded_.outputs; }

private:
    void load(const std::string& version);
    void release();
    void allocate_buffers();
    void check_batch(const std::string& got, std::int64_t batch) const;
    void bind(nvinfer1::IExecutionContext& context, std::int64_t batch, const void* image);
    void run(nvinfer1::IExecutionContext& context, cudaStream_t stream);
    Prepared& captured(std::int64_t batch);
    void wait_before(cudaStream_t stream);
    void mark_after(cudaStream_t stream);

    std::string plan_;
    EngineOptions options_;
    std::int64_t largest_batch_ = 0;
    std::int64_t last_batch_ = 0;
    LoadedEngine loaded_;
    DeviceMemory scratch_;
    std::int64_t scratch_bytes_ = 0;
    DeviceMemory input_;
    std::vector<DeviceMemory> output_;
    OwnedEvent done_;
    OwnedStream capture_stream_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    std::map<std::int64_t, Prepared> graphs_;
};

Engine::Impl::Impl(const std::filesystem::path& plan, const EngineOptions& options)
    : manifest(read_manifest(plan, options.check_hashes)), plan_(plan.string()), options_(options) {
    const std::string version = version_here();
    check_version(plan, manifest, flavor_here(), version);
    const Gpu gpu = find_gpu(plan, options.device);
    check_gpu(plan, manifest, gpu);
    runtime = std::string(flavor_here() == "rtx" ? "TensorRT-RTX " : "TensorRT ") + version + " on " + gpu.name +
              " (compute capability " + gpu.capability() + ")";
    const DeviceGuard guard(options.device, plan_);
    try {
        load(version);
    } catch (...) {
        release();
        throw;
    }
}

Engine::Impl::~Impl() {
    std::optional<DeviceGuard> guard;
    try {
        guard.emplace(options_.device, plan_);
    } catch (const Error&) {  // a GPU that is gone: what is ours is freed as far as it goes
    }
    release();
}

/// Frees what lies on the GPU, each thing before those that it uses.
void Engine::Impl::release() {
    if (done_) {
        cudaEventSynchronize(done_.get());  // the last run may still be at work in our memory
    }
    graphs_.clear();
    context_.reset();
    capture_stream_.reset();
    done_.reset();
    output_.clear();
    input_.reset();
    scratch_.reset();
    loaded_.engine.reset();
    loaded_.runtime.reset();
    loaded_.logger.reset();
}

void Engine::Impl::load(const std::string& version) {
    std::size_t before = 0;
    std::size_t after = 0;
    std::size_t total = 0;
    check(cudaMemGetInfo(&before, &total), plan_ + ": asking for free memory");
    loaded_ = load_engine(plan_, manifest, version);
    allocate_buffers();
    check(cudaMemGetInfo(&after, &total), plan_ + ": asking for free memory");
    loaded_bytes = before > after ? before - after : 0;
    warnings = loaded_.logger->warnings();
}

void Engine::Impl::allocate_buffers() {
    const Port& port = input();
    largest_batch_ = options_.max_batch > 0 ? options_.max_batch : port.largest_batch;
    if (largest_batch_ < port.smallest_batch || largest_batch_ > port.largest_batch) {
        throw Error(plan_ + ": a largest batch of " + std::to_string(largest_batch_) + " was asked; expected " +
                    port.describe());
    }
    scratch_bytes_ = loaded_.engine->getDeviceMemorySizeV2();
    if (scratch_bytes_ > 0) {
        scratch_ = allocate(static_cast<std::size_t>(scratch_bytes_), plan_);
    }
    input_ = allocate(bytes_of(port.type, port.at(largest_batch_)), plan_);
    for (const Port& output : outputs()) {
        const Shape shape = output.shape[0] < 0 ? output.at(largest_batch_) : output.shape;
        output_.push_back(allocate(bytes_of(output.type, shape), plan_));
    }
    done_ = make_event(plan_ + ": making an event", cudaEventDisableTiming);
    context_ = make_context(loaded_, scratch_.get(), scratch_bytes_, plan_);
    if (options_.cuda_graph) {
        capture_stream_ = make_stream(plan_ + ": making a stream");
    }
}

void Engine::Impl::check_batch(const std::string& got, std::int64_t batch) const {
    if (batch < input().smallest_batch || batch > largest_batch_) {
        Port takes = input();
        takes.largest_batch = largest_batch_;
        throw Error(plan_ + ": " + takes.name + " is " + got + "; expected " + takes.describe());
    }
}

void Engine::Impl::wait_before(cudaStream_t stream) {
    check(cudaStreamWaitEvent(stream, done_.get(), 0), plan_ + ": waiting for the run before");
}

void Engine::Impl::mark_after(cudaStream_t stream) {
    check(cudaEventRecord(done_.get(), stream), plan_ + ": marking the end of a run");
}

void Engine::Impl::copy_in(const Tensor& image, cudaStream_t stream) {
    const Port& port = input();
    const Shape expected = image.shape.empty() ? Shape() : port.at(image.shape[0]);
    if (image.type != port.type || image.shape != expected || image.data.size() != bytes_of(image.type, image.shape)) {
        throw Error(plan_ + ": " + port.name + " is " + image.describe() + "; expected " + port.describe());
    }
    check_batch(image.describe(), image.shape[0]);
    const DeviceGuard guard(options_.device, plan_);
    wait_before(stream);
    check(cudaMemcpyAsync(input_.get(), image.data.data(), image.data.size(), cudaMemcpyHostToDevice, stream),
          plan_ + ": copying the input");
    mark_after(stream);
}

void Engine::Impl::bind(nvinfer1::IExecutionContext& context, std::int64_t batch, const void* image) {
    const Port& port = input();
    if (!context.setInputShape(port.name.c_str(), dims_of(port.at(batch)))) {
        throw Error(plan_ + ": " + port.name + " cannot be " + to_text(port.at(batch)) + " (" +
                    loaded_.logger->failure() + "); expected " + port.describe());
    }
    // TensorRT's interface takes no pointer to const; it only reads an input
    bool bound = context.setTensorAddress(port.name.c_str(), const_cast<void*>(image));  // NOLINT
    for (std::size_t index = 0; index < output_.size(); ++index) {
        bound = context.setTensorAddress(outputs()[index].name.c_str(), output_[index].get()) && bound;
    }
    if (!bound) {
        throw Error(plan_ + ": its tensors cannot be bound (" + loaded_.logger->failure() +
                    "); give device memory that is aligned to 256 bytes");
    }
}

void Engine::Impl::run(nvinfer1::IExecutionContext& context, cudaStream_t stream) {
    if (!context.enqueueV3(stream)) {
        cudaGetLastError();
        throw Error(plan_ + ": the run failed (" + loaded_.logger->failure() + "); " + memory_text());
    }
}

/// Captures the run of a batch. It has a context of its own: what a graph was captured from must not change later.
Prepared& Engine::Impl::captured(std::int64_t batch) {
    const auto found = graphs_.find(batch);
    if (found != graphs_.end()) {
        return found->second;
    }
    const cudaStream_t stream = capture_stream_.get();
    Prepared prepared{make_context(loaded_, scratch_.get(), scratch_bytes_, plan_), nullptr};
    bind(*prepared.context, batch, input_.get());
    wait_before(stream);
    for (int index = 0; index < warm_up_runs; ++index) {
        run(*prepared.context, stream);
    }
    check(cudaStreamSynchronize(stream), plan_ + ": the run");
    const auto succeed = [&](cudaError_t code) {
        if (code != cudaSuccess) {
            cudaGetLastError();
            throw Error(plan_ + ": no CUDA graph can be captured (" + cudaGetErrorString(code) +
                        "); run it without one");
        }
    };
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
    if (options_.cuda_graph) {
        const Prepared& prepared = captured(batch);
        wait_before(stream);
        if (image != nullptr && image != input_.get()) {
            const std::size_t bytes = bytes_of(input().type, input().at(batch));
            check(cudaMemcpyAsync(input_.get(), image, bytes, cudaMemcpyDeviceToDevice, stream),
                  plan_ + ": copying the input");
        }
        check(cudaGraphLaunch(prepared.graph.get(), stream), plan_ + ": the run");
    } else {
        wait_before(stream);
        bind(*context_, batch, image != nullptr ? image : input_.get());
        run(*context_, stream);
    }
    last_batch_ = batch;
    mark_after(stream);
}

std::vector<DeviceTensor> Engine::Impl::device_outputs() const {
    if (last_batch_ == 0) {
        throw Error(plan_ + ": has no outputs before its first run; call enqueue");
    }
    std::vector<DeviceTensor> tensors;
    for (std::size_t index = 0; index < output_.size(); ++index) {
        const Port& port = outputs()[index];
        const Shape shape = port.shape[0] < 0 ? port.at(last_batch_) : port.shape;
        tensors.push_back({port.name, port.type, shape, output_[index].get(), bytes_of(port.type, shape)});
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
              plan_ + ": copying the outputs");
        tensors.push_back(std::move(tensor));
    }
    mark_after(stream);
    check(cudaStreamSynchronize(stream), plan_ + ": the run");
    return tensors;
}

Engine::Engine(const std::filesystem::path& plan, const EngineOptions& options)
    : impl_(std::make_unique<Impl>(plan, options)) {}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

const Manifest& Engine::manifest() const { return impl_->manifest; }
const Port& Engine::input() const { return impl_->input(); }
const std::vector<Port>& Engine::outputs() const { return impl_->outputs(); }
const std::string& Engine::runtime() const { return impl_->runtime; }
const std::vector<std::string>& Engine::warnings() const { return impl_->warnings; }
std::size_t Engine::loaded_bytes() const { return impl_->loaded_bytes; }
void Engine::copy_in(const Tensor& image, Stream stream) { impl_->copy_in(image, stream); }
void Engine::enqueue(std::int64_t batch, Stream stream) { impl_->enqueue(batch, stream, nullptr); }
void Engine::enqueue(std::int64_t batch, Stream stream, const void* image) { impl_->enqueue(batch, stream, image); }
std::vector<DeviceTensor> Engine::device_outputs() const { return impl_->device_outputs(); }
std::vector<Tensor> Engine::copy_out(Stream stream) { return impl_->copy_out(stream); }

std::vector<Tensor> Engine::infer(const Tensor& image, Stream stream) {
    impl_->copy_in(image, stream);
    impl_->enqueue(image.shape[0], stream, nullptr);
    return impl_->copy_out(stream);
}

}  // namespace neck
