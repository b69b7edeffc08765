#include "gpu/cuda.hpp"

#include "neck/error.hpp"
#include "files/text.hpp"

namespace neck {

void check(cudaError_t code, const std::string& failure) {
    if (code == cudaSuccess) {
        return;
    }
    cudaGetLastError();  // else the next call would tell it again
    if (code == cudaErrorMemoryAllocation) {
        throw GpuError(failure + ": out of device memory; " + memory_text());
    }
    throw GpuError(failure + " (" + cudaGetErrorString(code) + "); " +
                   "check with nvidia-smi that the GPU still works, and start the program again");
}

void check_device_memory(const void* address, int device, const std::string& plan, const std::string& name) {
    cudaPointerAttributes found{};
    check(cudaPointerGetAttributes(&found, address),
          plan + ": CUDA could not tell whether the memory for " + name + " is on the host or on a GPU");
    const bool on_device = found.type == cudaMemoryTypeDevice || found.type == cudaMemoryTypeManaged;
    if (!on_device || (found.type == cudaMemoryTypeDevice && found.device != device)) {
        throw Error(plan + ": the memory for " + name + " is " +
                    (on_device ? "on GPU " + std::to_string(found.device) : "on the host") + "; pass memory of GPU " +
                    std::to_string(device) + " instead");
    }
}

std::string driver_version(const std::string& plan) {
    int version = 0;
    check(cudaDriverGetVersion(&version),
          plan + ": the plan was not loaded, because reading the version of the NVIDIA driver failed with the "
                 "following CUDA error");
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string memory_text() {
    std::size_t free_bytes = 0;
    std::size_t total_bytes = 0;
    if (cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess) {
        cudaGetLastError();
        return "the amount of free device memory is unknown; check with nvidia-smi that the GPU still works";
    }
    return format(
        "%.1f of %.1f GB of device memory are free; if that is too little, close other programs or use a smaller batch",
        static_cast<double>(free_bytes) / 1e9, static_cast<double>(total_bytes) / 1e9);
}

DeviceMemory allocate(std::size_t bytes, const std::string& plan) {
    void* address = nullptr;
    // an empty tensor has an address, too: TensorRT refuses none
    check(cudaMalloc(&address, bytes == 0 ? 1 : bytes), plan + ": allocating device memory failed");
    return DeviceMemory(static_cast<std::byte*>(address));
}

OwnedStream make_stream(const std::string& what) {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), what);
    return OwnedStream(stream);
}

OwnedEvent make_event(const std::string& what, unsigned flags) {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, flags), what);
    return OwnedEvent(event);
}

DeviceGuard::DeviceGuard(int device, const std::string& plan) {
    check(cudaGetDevice(&before_), plan + ": asking CUDA for the current GPU failed");
    check(cudaSetDevice(device), plan + ": selecting GPU " + std::to_string(device) + " failed");
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(before_); }

}  // namespace neck
