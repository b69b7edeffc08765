#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>
#include <type_traits>

#include "neck/error.hpp"

namespace neck {

/// A call of CUDA or TensorRT failed: the context that ran is of no more use.
class NECK_API GpuError : public Error {
public:
    using Error::Error;
};

/// Throws where a call of the CUDA runtime failed.
/// \param failure begins the message, such as `x.plan: running the plan on the GPU failed`.
/// \throws GpuError
NECK_API void check(cudaError_t code, const std::string& failure);

/// The newest CUDA that the driver serves, such as `13.0`.
std::string driver_version(const std::string& plan);

/// `3.2 of 23.6 GB of device memory are free; if too little, ...`
std::string memory_text();

/// \throws Error an address that is not in this GPU's memory.
void check_device_memory(const void* address, int device, const std::string& plan, const std::string& name);

/// Frees what cudaMalloc gave.
struct DeviceFree {
    void operator()(std::byte* address) const { cudaFree(address); }
};
using DeviceMemory = std::unique_ptr<std::byte, DeviceFree>;

/// \throws Error out of device memory.
NECK_API DeviceMemory allocate(std::size_t bytes, const std::string& plan);

/// A CUDA handle and what ends it.
template <typename Handle, cudaError_t (*destroy)(Handle)>
struct Destroy {
    using pointer = Handle;
    void operator()(Handle handle) const { destroy(handle); }
};
template <typename Handle, cudaError_t (*destroy)(Handle)>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy<Handle, destroy>>;

using OwnedStream = Owned<cudaStream_t, cudaStreamDestroy>;
using OwnedEvent = Owned<cudaEvent_t, cudaEventDestroy>;
using OwnedGraph = Owned<cudaGraph_t, cudaGraphDestroy>;
using OwnedGraphExec = Owned<cudaGraphExec_t, cudaGraphExecDestroy>;

NECK_API OwnedStream make_stream(const std::string& what);

/// \param flags cudaEventDefault, which tells times, or cudaEventDisableTiming.
NECK_API OwnedEvent make_event(const std::string& what, unsigned flags);

/// Makes a GPU the thread's current one, and the one before it again at the end.
class NECK_API DeviceGuard {
public:
    DeviceGuard(int device, const std::string& plan);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int before_ = 0;
};

}  // namespace neck
