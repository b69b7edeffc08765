#pragma once

#include <cstdio>
#include <functional>
#include <list>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <unistd.h>

#include "fake.hpp"

struct CUevent_st {
    cudaStream_t stream = nullptr;
    std::uint64_t place = 0;
};

struct CUgraph_st {
    std::vector<std::function<void()>> work;
};

struct CUgraphExec_st {
    std::vector<std::function<void()>> work;
};

struct CUstream_st {
    std::list<std::function<void()>> waiting;
    std::uint64_t queued = 0;
    std::uint64_t finished = 0;
    cudaGraph_t capture = nullptr;

    void run_to(std::uint64_t place) {
        while (finished < place && !waiting.empty()) {
            const std::function<void()> work = std::move(waiting.front());
            waiting.pop_front();
            ++finished;
            work();
        }
    }
};

namespace fake {

/// What cudaMalloc gave.
struct Memory {
    std::size_t size = 0;
    int device = 0;
};

/// All that the fake of CUDA keeps.
struct State {
    std::map<std::string, int> calls;
    bool failed = false;
    int alive = 0;
    std::set<cudaStream_t> streams;
    std::map<const char*, Memory> memory;
    CUstream_st null_stream;

    ~State() {
        if (alive != 0) {
            std::fprintf(stderr, "fake: %d things were left on the GPU\n", alive);
            std::fflush(nullptr);
            _exit(99);
        }
    }
};

State& state();

/// What CUDA keeps for each thread.
inline thread_local int current_device = 0;
inline thread_local cudaError_t last_error = cudaSuccess;

/// The stream itself, or the one that nullptr stands for.
cudaStream_t real(cudaStream_t stream);

/// Keeps the code of a call as cudaGetLastError's, and returns it.
cudaError_t give(cudaError_t code);

/// `code` where this call is to fail.
cudaError_t try_call(const char* function, cudaError_t code = cudaErrorLaunchFailure);

}  // namespace fake
