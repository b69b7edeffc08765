#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "neck/dlpack.hpp"
#include "neck/error.hpp"
#include "neck/export.hpp"
#include "neck/manifest.hpp"
#include "neck/preprocess.hpp"
#include "neck/tensor.hpp"

struct CUstream_st;  // cudaStream_t and cudaEvent_t point to these; so this header needs none of CUDA's
struct CUevent_st;

namespace neck {

using Stream = CUstream_st*;
using Event = CUevent_st*;

struct EngineOptions {
    int device = 0;            ///< CUDA's number of the GPU
    bool cuda_graph = false;   ///< run by a CUDA graph, captured at the first run of each batch size
    bool check_hashes = true;  ///< compare the plan's SHA-256 with its manifest's
    /// TensorRT-RTX compiles kernels when a batch size is run for the first time, in every new process. They are kept
    /// in this file for the next start; empty: X.plan.cache beside the plan. TensorRT needs none.
    std::filesystem::path runtime_cache{};
    bool use_runtime_cache = true;
    bool rtx_graphs = false;     ///< TensorRT-RTX captures CUDA graphs of its own; not together with cuda_graph
    std::int64_t max_batch = 0;  ///< memory is allocated for this batch; 0: for the largest that the plan takes
};

/// An output in device memory; valid until the engine's next run.
struct DeviceTensor {
    std::string name;
    DataType type = DataType::float32;
    Shape shape;
    const void* data = nullptr;
    std::size_t bytes = 0;
};

/// A plan in device memory, ready to run; for one thread at a time. One that was moved from throws Error.
///
/// All device memory is allocated when it is made. Its own buffers are used by one run after the other: a run waits,
/// on the GPU, for the run before it, on whichever stream that was.
class NECK_API Engine {
public:
    /// Checks the plan, its manifest, the GPU and TensorRT's version, then loads it.
    /// \throws Error it cannot run here; the message says why and what to do.
    explicit Engine(const std::filesystem::path& plan, const EngineOptions& options = {});
    ~Engine();
    Engine(Engine&&) noexcept;
    Engine& operator=(Engine&&) noexcept;

    const Manifest& manifest() const;
    const Port& input() const;
    const std::vector<Port>& outputs() const;

    /// TensorRT and the GPU, such as `TensorRT 10.16.1.11 on NVIDIA L4 (compute capability 8.9)`.
    const std::string& runtime() const;

    /// What TensorRT warned of while loading, and a runtime cache that cannot be used or written.
    const std::vector<std::string>& warnings() const;

    /// Whether the kernels of an earlier start were there.
    bool warm() const;

    /// Whether a call of CUDA or TensorRT failed since the context was made: what its next run gives is not known.
    bool failed() const;

    /// After such a failure: makes the context, its memory and its graphs anew; the weights stay. Memory that was bound to
    /// outputs is no longer.
    /// \throws Error the GPU has not recovered: CUDA's errors of a kernel's memory accesses last until the process ends.
    void recover();

    /// Another context over the same weights, with buffers of its own: for another thread.
    /// \throws Error as loading.
    Engine another() const;

    /// Device memory of this context: its input, outputs and what a run needs meanwhile, without the weights.
    std::size_t context_bytes() const;

    /// Device memory that loading took.
    std::size_t loaded_bytes() const;

    /// Copies a batch from host memory to the engine's input.
    /// \throws Error an input that the plan does not take.
    void copy_in(const Tensor& image, Stream stream);

    /// Brings an image that is in device memory to the engine's input: resized and normalized by a kernel.
    /// \param pixels RGB, 8 bits, on the engine's GPU.
    /// \param pitch bytes from one row to the next.
    /// \param entry of the batch, from 0.
    /// \throws Error pixels that are elsewhere, or a library that was built without nvcc.
    Fit copy_in_rgb8(const void* pixels, Size size, std::size_t pitch, Stream stream, std::int64_t entry = 0);

    /// Starts a run of the engine's input; it returns before the run ends.
    /// \throws Error a batch that the plan does not take, or a run that cannot be started.
    void enqueue(std::int64_t batch, Stream stream);

    /// The same with an input in device memory, which is read where it is; by a CUDA graph, or at an address
    /// that is no multiple of 256 bytes, it is copied first.
    void enqueue(std::int64_t batch, Stream stream, const void* image);

    /// Has an output written to the caller's memory from the next run on, instead of to the engine's own.
    /// \param memory on the engine's GPU, at a multiple of 256 bytes; nullptr: the engine's own again.
    /// \param bytes of it: enough for the largest batch.
    /// \throws Error no such output, or memory that is elsewhere, not aligned or too little.
    void bind_output(const std::string& name, void* memory, std::size_t bytes);

    /// Every output goes to the engine's own memory again, when its last run has ended.
    void unbind_outputs() noexcept;

    /// What marks the end of the last run or copy: another stream waits for it by cudaStreamWaitEvent.
    Event finished() const;

    /// An output of the last run for whoever reads DLPack (PyTorch, CuPy, a second engine), without a copy.
    ///
    /// The engine's own memory lives until it is given back, also after the engine; the next run writes to it. Memory
    /// that the caller bound stays the caller's. Work on another stream waits for finished() first.
    dlpack::Managed* to_dlpack(const std::string& name) const;

    /// The outputs of the last run where they are; work on that run's stream sees them.
    std::vector<DeviceTensor> device_outputs() const;

    /// Copies the outputs of the last run to host memory and waits for them.
    std::vector<Tensor> copy_out(Stream stream);

    /// copy_in, enqueue and copy_out.
    std::vector<Tensor> infer(const Tensor& image, Stream stream);

private:
    class Impl;
    explicit Engine(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

}  // namespace neck
