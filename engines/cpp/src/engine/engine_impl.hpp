#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "gpu/cuda.hpp"
#include "neck/engine.hpp"
#include "plan/load.hpp"
#include "plan/runtime_cache.hpp"

namespace neck {

/// Of every tensor's address, says setTensorAddress; cudaMalloc keeps it.
constexpr std::uintptr_t alignment = 256;

/// A context at one batch size, and the CUDA graph of its run where graphs are asked for.
struct Prepared {
    std::unique_ptr<nvinfer1::IExecutionContext> context;
    OwnedGraphExec graph;
};

/// Where an output is written: memory of our own, which whoever reads it may hold on to, or the caller's.
struct Output {
    std::shared_ptr<std::byte> own;
    void* bound = nullptr;

    void* address() const { return bound != nullptr ? bound : own.get(); }
};

class Engine::Impl {
public:
    Impl(const std::filesystem::path& plan, const EngineOptions& options);
    /// Another context over the same weights.
    explicit Impl(const Impl* first);
    ~Impl();
    Impl(const Impl&) = delete;
    Impl& operator=(const Impl&) = delete;

    void copy_in(const Tensor& image, cudaStream_t stream);
    Fit copy_in_rgb8(const void* pixels, Size size, std::size_t pitch, cudaStream_t stream, std::int64_t entry);
    void enqueue(std::int64_t batch, cudaStream_t stream, const void* image);
    std::vector<DeviceTensor> device_outputs() const;
    std::vector<Tensor> copy_out(cudaStream_t stream);
    void bind_output(const std::string& name, void* memory, std::size_t bytes);
    void unbind_outputs() noexcept;
    void recover();
    const std::string& plan() const { return plan_; }

    /// Whether its context and memory are there: a recovery that failed leaves none.
    bool ready() const { return context_ != nullptr; }
    dlpack::Managed* to_dlpack(const std::string& name) const;
    cudaEvent_t finished() const { return done_.get(); }
    std::size_t context_bytes() const { return context_bytes_; }

    Manifest manifest;
    std::string runtime;
    std::vector<std::string> warnings;
    std::size_t loaded_bytes = 0;
    bool warm = false;
    bool failed = false;  ///< a call of CUDA or TensorRT failed since the context was made
    const Port& input() const { return loaded_->inputs[0]; }
    const std::vector<Port>& outputs() const { return loaded_->outputs; }

private:
    void load(const std::string& version);
    void release();
    void release_buffers();
    void warn(const std::string& line);
    void allocate_buffers();
    void check_batch(const std::string& got, std::int64_t batch) const;
    void bind(nvinfer1::IExecutionContext& context, std::int64_t batch, const void* image);
    void run(nvinfer1::IExecutionContext& context, cudaStream_t stream);
    Prepared& captured(std::int64_t batch);
    std::size_t most_bytes(const Port& output) const;
    std::size_t find_output(const std::string& name) const;
    void wait_before(cudaStream_t stream);
    void mark_after(cudaStream_t stream);
    void keep_kernels(std::int64_t batch);

    std::string plan_;
    EngineOptions options_;
    std::int64_t largest_batch_ = 0;
    std::int64_t last_batch_ = 0;
    std::shared_ptr<LoadedEngine> loaded_;
    DeviceMemory scratch_;
    std::int64_t scratch_bytes_ = 0;
    DeviceMemory input_;
    std::vector<Output> output_;
    std::size_t context_bytes_ = 0;
    RuntimeCache cache_;
    std::set<std::int64_t> compiled_;  ///< batch sizes whose kernels are in the cache's file
    OwnedEvent done_;
    OwnedStream capture_stream_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    std::map<std::int64_t, Prepared> graphs_;
};

}  // namespace neck
