#include "neck/engine.hpp"

#include <algorithm>
#include <optional>
#include <utility>

#include "files/guard.hpp"
#include "files/log.hpp"
#include "plan/checks.hpp"
#include "engine/engine_impl.hpp"
#include "plan/flavor.hpp"

namespace neck {

Engine::Impl::Impl(const std::filesystem::path& plan, const EngineOptions& options)
    : manifest(read_manifest(plan, options.check_hashes)), plan_(plan.string()), options_(options) {
    const std::string version = version_here();
    check_version(plan, manifest, flavor_here(), version);
    const Gpu gpu = find_gpu(plan, options.device);
    check_gpu(plan, manifest, gpu, version);
    runtime = std::string(flavor_here() == "rtx" ? "TensorRT-RTX " : "TensorRT ") + version + " on " + gpu.name +
              " (compute capability " + gpu.capability() + ")";
    const bool rtx = flavor_here() == "rtx";
    if (options.rtx_graphs && (!rtx || options.cuda_graph)) {
        throw Error(plan_ + ": --rtx-graph (in C++: EngineOptions::rtx_graphs) " +
                    (rtx ? "cannot be combined with --graph (EngineOptions::cuda_graph); use only one of them"
                         : "needs TensorRT-RTX, but this program was built for TensorRT; use --graph "
                           "(EngineOptions::cuda_graph) instead"));
    }
    if (rtx && options.use_runtime_cache) {
        cache_ = RuntimeCache(options.runtime_cache.empty() ? plan_ + ".cache" : options.runtime_cache.string(),
                              runtime + ", driver for CUDA " + driver_version(plan_) + ", plan with SHA-256 " +
                                  manifest.plan_hash());
    }
    const DeviceGuard guard(options.device, plan_);
    try {
        load(version);
    } catch (...) {
        release();
        throw;
    }
}

Engine::Impl::Impl(const Impl* first)
    : manifest(first->manifest),
      runtime(first->runtime),
      warnings(first->warnings),
      loaded_bytes(first->loaded_bytes),
      warm(first->warm),
      plan_(first->plan_),
      options_(first->options_),
      loaded_(first->loaded_),
      cache_(first->cache_) {
    const DeviceGuard guard(options_.device, plan_);
    try {
        allocate_buffers();
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
    release_buffers();
    loaded_.reset();
}

void Engine::Impl::release_buffers() {
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
}

/// Makes the context and its memory anew. The weights stay where they are.
void Engine::Impl::recover() {
    const DeviceGuard guard(options_.device, plan_);
    release_buffers();
    cudaGetLastError();  // of what was freed after the failure
    last_batch_ = 0;
    failed = true;
    try {
        allocate_buffers();
    } catch (...) {
        release_buffers();
        throw;
    }
    failed = false;
}

void Engine::Impl::warn(const std::string& line) {
    warnings.push_back(line);
    log_line(LogLevel::warning, line);
}

void Engine::Impl::load(const std::string& version) {
    std::size_t before = 0;
    std::size_t after = 0;
    std::size_t total = 0;
    check(cudaMemGetInfo(&before, &total), plan_ + ": querying the free device memory failed");
    loaded_ = load_engine(plan_, manifest, version);
    for (const std::string& warning : loaded_->logger->warnings()) {
        warnings.push_back("TensorRT warning: " + warning);
    }
    std::string why_not;
    const std::string cached = cache_.read(why_not);
    loaded_->config = make_runtime_config(*loaded_->engine, cached, options_.rtx_graphs, warm);
    if (!cached.empty() && !warm) {
        why_not = plan_ + ": TensorRT-RTX rejected the runtime cache (" + loaded_->logger->failure() +
                  "); the kernels are compiled again";
    }
    if (!why_not.empty()) {
        warn(why_not);
    }
    allocate_buffers();
    check(cudaMemGetInfo(&after, &total), plan_ + ": querying the free device memory failed");
    loaded_bytes = before > after ? before - after : 0;
}

void Engine::Impl::allocate_buffers() {
    const Port& port = input();
    largest_batch_ = options_.max_batch != 0 ? options_.max_batch : port.largest_batch;
    if (largest_batch_ < port.smallest_batch || largest_batch_ > port.largest_batch) {
        throw Error(plan_ + ": EngineOptions::max_batch is " + std::to_string(largest_batch_) +
                    ", but the plan's smallest batch size is " + std::to_string(port.smallest_batch) +
                    " and the plan's largest batch size is " + std::to_string(port.largest_batch) +
                    ". Set EngineOptions::max_batch to a value within these limits, or to 0 for the plan's largest "
                    "batch size");
    }
    scratch_bytes_ = loaded_->engine->getDeviceMemorySizeV2();
    if (scratch_bytes_ > 0) {
        scratch_ = allocate(static_cast<std::size_t>(scratch_bytes_), plan_);
    }
    const std::size_t input_bytes = bytes_of(port.type, port.at(largest_batch_));
    input_ = allocate(input_bytes, plan_);
    context_bytes_ = static_cast<std::size_t>(std::max<std::int64_t>(0, scratch_bytes_)) + input_bytes;
    for (const Port& output : outputs()) {
        output_.push_back({allocate(most_bytes(output), plan_), nullptr});
        context_bytes_ += most_bytes(output);
    }
    done_ = make_event(
        plan_ + ": the plan cannot be run, because creating a CUDA event failed with the following CUDA error",
        cudaEventDisableTiming);
    context_ = make_context(*loaded_, scratch_.get(), scratch_bytes_, plan_);
    if (options_.cuda_graph) {
        capture_stream_ = make_stream(plan_ + ": creating a CUDA stream failed");
    }
}

namespace {

template <typename Impl>
Impl& existing(const std::unique_ptr<Impl>& impl) {
    if (!impl) {
        throw Error("this neck::Engine was moved from; use the engine that it was moved to");
    }
    return *impl;
}

/// Does work on the GPU and notes whether that failed.
template <typename Impl, typename Work>
auto use(const std::unique_ptr<Impl>& impl, Work work) -> decltype(work(*impl)) {
    Impl& engine = existing(impl);
    return guarded(engine.plan(), [&] {
        if (!engine.ready()) {
            throw Error(engine.plan() +
                        ": the execution context was discarded after an error on the GPU; call recover(), "
                        "or start the program again");
        }
        try {
            return work(engine);
        } catch (const GpuError&) {
            engine.failed = true;
            throw;
        }
    });
}

}  // namespace

Engine::Engine(const std::filesystem::path& plan, const EngineOptions& options)
    : impl_(guarded(plan, [&] { return std::make_unique<Impl>(plan, options); })) {}
Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

const Manifest& Engine::manifest() const { return existing(impl_).manifest; }
const Port& Engine::input() const { return existing(impl_).input(); }
const std::vector<Port>& Engine::outputs() const { return existing(impl_).outputs(); }
const std::string& Engine::runtime() const { return existing(impl_).runtime; }
const std::vector<std::string>& Engine::warnings() const { return existing(impl_).warnings; }
bool Engine::warm() const { return existing(impl_).warm; }
bool Engine::failed() const { return existing(impl_).failed; }
std::size_t Engine::loaded_bytes() const { return existing(impl_).loaded_bytes; }
std::size_t Engine::context_bytes() const { return existing(impl_).context_bytes(); }
Event Engine::finished() const { return existing(impl_).finished(); }

Engine Engine::another() const {
    const Impl& first = existing(impl_);
    return guarded(first.plan(), [&] { return Engine(std::make_unique<Impl>(&first)); });
}

void Engine::recover() {
    Impl& engine = existing(impl_);
    guarded(engine.plan(), [&] { engine.recover(); });
}

void Engine::bind_output(const std::string& name, void* memory, std::size_t bytes) {
    use(impl_, [&](Impl& engine) { engine.bind_output(name, memory, bytes); });
}

void Engine::unbind_outputs() noexcept {
    if (impl_ && impl_->ready()) {
        impl_->unbind_outputs();
    }
}

dlpack::Managed* Engine::to_dlpack(const std::string& name) const {
    return use(impl_, [&](const Impl& engine) { return engine.to_dlpack(name); });
}

void Engine::copy_in(const Tensor& image, Stream stream) {
    use(impl_, [&](Impl& engine) { engine.copy_in(image, stream); });
}

Fit Engine::copy_in_rgb8(const void* pixels, Size size, std::size_t pitch, Stream stream, std::int64_t entry) {
    return use(impl_, [&](Impl& engine) { return engine.copy_in_rgb8(pixels, size, pitch, stream, entry); });
}

void Engine::enqueue(std::int64_t batch, Stream stream) { enqueue(batch, stream, nullptr); }

void Engine::enqueue(std::int64_t batch, Stream stream, const void* image) {
    use(impl_, [&](Impl& engine) { engine.enqueue(batch, stream, image); });
}

std::vector<DeviceTensor> Engine::device_outputs() const {
    return use(impl_, [](const Impl& engine) { return engine.device_outputs(); });
}

std::vector<Tensor> Engine::copy_out(Stream stream) {
    return use(impl_, [&](Impl& engine) { return engine.copy_out(stream); });
}

std::vector<Tensor> Engine::infer(const Tensor& image, Stream stream) {
    copy_in(image, stream);
    enqueue(image.shape.at(0), stream);
    return copy_out(stream);
}

}  // namespace neck
