// What the fake of TensorRT asks of its surroundings (fake.hpp), on CUDA itself. A run brings its inputs to the
// host, computes there in a host function of the stream, late, and takes the outputs back: all that a graph can
// capture.
#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <mutex>
#include <thread>
#include <utility>

#include "fake.hpp"

namespace fake {
namespace {

/// Of every run, so that a wait that is missing gives the figures of before.
constexpr std::chrono::milliseconds late{5};

std::atomic<int> made{0};

std::recursive_mutex& mutex() {
    static std::recursive_mutex only;
    return only;
}

void need(cudaError_t code, const char* what) {
    if (code != cudaSuccess) {
        std::fprintf(stderr, "fake: %s: %s\n", what, cudaGetErrorString(code));
        std::abort();
    }
}

struct Launch {
    std::function<void()> work;
    bool once;
};

void CUDART_CB launched(void* data) {
    auto* launch = static_cast<Launch*>(data);
    std::this_thread::sleep_for(late);
    launch->work();
    if (launch->once) {
        delete launch;
    }
}

std::size_t bytes_of(const TensorFacts& tensor, const std::vector<std::int64_t>& shape) {
    return elements(shape) * element_size(tensor.type);
}

}  // namespace

Lock::Lock() { mutex().lock(); }
Lock::~Lock() { mutex().unlock(); }

bool fails(const char* /*function*/) { return false; }
int alive() { return made; }
void count(int change) { made += change; }

bool capturing(cudaStream_t stream) {
    cudaStreamCaptureStatus status{};
    need(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    return status == cudaStreamCaptureStatusActive;
}

void queue(cudaStream_t stream, std::function<void()> work) {
    static std::list<Launch> captured;  // a graph runs them as often as it likes
    const Lock lock;
    Launch* launch = nullptr;
    if (capturing(stream)) {
        launch = &captured.emplace_back(Launch{std::move(work), false});
    } else {
        launch = new Launch{std::move(work), true};
    }
    need(cudaLaunchHostFunc(stream, launched, launch), "cudaLaunchHostFunc");
}

/// Pinned memory for the largest batch, made before anything is captured.
Reach::Reach(const Program& program) : program_(program) {
    for (const TensorFacts& tensor : program.tensors) {
        std::vector<std::int64_t> shape = tensor.shape;
        shape[0] = shape[0] < 0 ? program.tensors.front().batch.back() : shape[0];
        need(cudaMallocHost(&staged_[tensor.name], bytes_of(tensor, shape)), "cudaMallocHost");
    }
}

Reach::~Reach() {
    for (const auto& [name, memory] : staged_) {
        cudaFreeHost(memory);
    }
}

std::map<std::string, Bound> Reach::bring(const std::map<std::string, Bound>& bound, cudaStream_t stream) {
    std::map<std::string, Bound> here = bound;
    for (const TensorFacts& tensor : program_.tensors) {
        Bound& one = here.at(tensor.name);
        void* const from = std::exchange(one.data, staged_.at(tensor.name));
        if (tensor.input) {
            need(cudaMemcpyAsync(one.data, from, bytes_of(tensor, one.shape), cudaMemcpyDeviceToHost, stream),
                 "an input to the host");
        }
    }
    return here;
}

void Reach::take_back(const std::map<std::string, Bound>& bound, cudaStream_t stream) {
    for (const TensorFacts& tensor : program_.tensors) {
        const Bound& one = bound.at(tensor.name);
        if (!tensor.input) {
            need(cudaMemcpyAsync(one.data, staged_.at(tensor.name), bytes_of(tensor, one.shape), cudaMemcpyHostToDevice,
                                 stream),
                 "an output to the GPU");
        }
    }
}

void spoil(void* memory, std::size_t size, cudaStream_t stream) {
    need(cudaMemsetAsync(memory, 7, size, stream), "cudaMemsetAsync");
}

}  // namespace fake
