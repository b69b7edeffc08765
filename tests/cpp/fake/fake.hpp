// How the fakes behave.
//
// Work is lazy: what is queued on a stream runs only when somebody waits for it, so that a wait that is missing gives
// wrong figures. Device memory is the host's, so that the address sanitizer sees every access. All that is made is
// counted: what is left at the end of the program is told on stderr, and its exit code becomes 99.
//
// The environment says what goes wrong, read at each call:
//   STAND_IN_DEVICES     number of GPUs (1); 0: no driver
//   STAND_IN_CAPABILITY  compute capability (8.9)
//   STAND_IN_VERSION     TensorRT's version (10.16.1.11)
//   STAND_IN_FAIL        a call that fails, such as cudaMalloc:2 (the second); without a number: every one
//   STAND_IN_KILL        a call at which the process is killed, such as enqueueV3:7
//   STAND_IN_DRIVER      CUDA's version of the driver (13000)
//   STAND_IN_FREE        bytes of device memory that are free (20000000000)
//   STAND_IN_NUDGE       added to every output
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "NvInferRuntime.h"

namespace fake {

/// Held in every call: the fakes work in one thread at a time, as CUDA's and TensorRT's locks would have it.
class Lock {
public:
    Lock();
    ~Lock();
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;
};

/// Whether this call of a function is the one that is to fail.
bool fails(const char* function);

/// Counts calls of every function from 0 again.
void start_over();

/// What STAND_IN_FAIL asked for has happened since.
bool has_failed();

/// What exists now: device memory, streams, events, graphs, TensorRT's objects.
int alive();

/// Adds what is made (1) or destroyed (-1).
void count(int change);

/// Queues work on a stream, or adds it to the graph that is captured there.
void queue(cudaStream_t stream, std::function<void()> work);

/// Whether a stream is captured now.
bool capturing(cudaStream_t stream);

struct TensorFacts {
    std::string name;
    nvinfer1::DataType type = nvinfer1::DataType::kFLOAT;
    bool input = false;
    std::vector<std::int64_t> shape;           ///< -1: dynamic batch
    std::vector<std::int64_t> batch{1, 1, 1};  ///< smallest, optimum, largest
};

/// An input or output of one run.
struct Bound {
    std::vector<std::int64_t> shape;
    void* data = nullptr;
};

/// What a plan computes.
class Program {
public:
    virtual ~Program() = default;
    virtual void run(const std::map<std::string, Bound>& tensors) const = 0;

    std::vector<TensorFacts> tensors;
    std::int64_t scratch = 0;
    std::string warning;
    bool rtx = false;        ///< kernels are compiled while it runs
    bool lean = false;       ///< has a lean runtime: host code, which the caller must allow
    bool allocates = false;  ///< memory, too: such a run cannot be captured
};

/// The host's memory through which a context's runs reach tensors: the fake's device memory is the host's already,
/// that of a GPU (real_cuda/real.cpp) is copied there and back on the stream.
class Reach {
public:
    explicit Reach(const Program& program);
    ~Reach();
    Reach(const Reach&) = delete;
    Reach& operator=(const Reach&) = delete;

    /// Queues what brings the inputs to the host.
    /// \return where the host finds every tensor.
    std::map<std::string, Bound> bring(const std::map<std::string, Bound>& bound, cudaStream_t stream);

    /// Queues what takes the outputs from the host to where they are wanted.
    void take_back(const std::map<std::string, Bound>& bound, cudaStream_t stream);

private:
    const Program& program_;
    std::map<std::string, void*> staged_;
};

/// Queues that device memory is overwritten.
void spoil(void* memory, std::size_t size, cudaStream_t stream);

/// Reads a plan: our own few lines of text, or where ONNX Runtime is built in an ONNX file.
/// \return nothing where it is neither.
std::unique_ptr<Program> read_program(std::string_view plan);
std::unique_ptr<Program> read_onnx(std::string_view plan);

std::size_t element_size(nvinfer1::DataType type);
std::size_t elements(const std::vector<std::int64_t>& shape);

}  // namespace fake
