#include "gpu/cuda.hpp"

#include "neck/error.hpp"
#include "files/text.hpp"

namespace neck {

void check(cudaError_t code, const std::string& what) {
    if (code == cudaSuccess) {
        return;
    }
    cudaGetLastError();  // else the next call would tell it again
    if (code == cudaErrorMemoryAllocation) {
        throw GpuError(what + ": out of device memory; " + memory_text());
    }
    throw GpuError(what + " failed (" + cudaGetErrorString(code) + "); " +
                "check with nvidia-smi that the GPU still works, and start the program again");
}

void check_device_memory(const void* address, int device, const std::string& what) {
    cudaPointerAttributes found{};
    check(cudaPointerGetAttributes(&found, address), what + ": asking where it lies");
    const bool on_device = found.type == cudaMemoryTypeDevice || found.type == cudaMemoryTypeManaged;
    if (!on_device || (found.type == cudaMemoryTypeDevice && found.device != device)) {
        throw Error(what + " is in " +
                    (on_device ? "the memory of GPU " + std::to_string(found.device) : "host memory") +
                    "; expected memory of GPU " + std::to_string(device) + ", so copy it there first");
    }
}

std::string driver_version(const std::string& plan) {
    int version = 0;
    check(cudaDriverGetVersion(&version), plan + ": asking for the driver's version");
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string memory_text() {
    std::size_t free_bytes = 0;
    std::size_t total_bytes = 0;
    if (cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess) {
        cudaGetLastError();
        return "the free device memory is unknown";
    }
    return format(
        "%.1f of %.1f GB of device memory are free; if that is too little, close other programs or use a smaller batch",
        static_cast<double>(free_bytes) / 1e9, static_cast<double>(total_bytes) / 1e9);
}

DeviceMemory allocate(std::size_t bytes, const std::string& plan) {
    void* address = nullptr;
    // an empty tensor has an address, too: TensorRT refuses none
    check(cudaMalloc(&address, bytes == 0 ? 1 : bytes), plan);
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

DeviceGuard::DeviceGuard(int device, const std::string& what) {
    check(cudaGetDevice(&before_), what + ": finding the current GPU");
    check(cudaSetDevice(device), what + ": taking GPU " + std::to_string(device));
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(before_); }

}  // namespace neck
