// The resize kernel on a GPU against neck::Preprocessor on the CPU. Exit status 77: there is no driver or GPU.
#include <cuda_runtime_api.h>

#include <iostream>

#include "expect.hpp"
#include "images/decode.hpp"
#include "resizes.hpp"

namespace {

constexpr int not_run = 77;

void check(cudaError_t code) {
    if (code != cudaSuccess) {
        throw neck::Error(std::string("CUDA: ") + cudaGetErrorString(code));
    }
}

/// Does a job whose addresses are the host's by copies on the GPU, its rows at a pitch of their own.
void resize_on_gpu(const neck::DeviceResize& job) {
    const auto height = static_cast<std::size_t>(job.height);
    neck::DeviceResize there = job;
    void* pixels = nullptr;
    check(cudaMallocPitch(&pixels, &there.pitch, static_cast<std::size_t>(job.width) * 3, height));
    check(cudaMalloc(&there.target, target_bytes(job)));
    check(cudaMemcpy2D(pixels, there.pitch, job.pixels, job.pitch, static_cast<std::size_t>(job.width) * 3, height,
                       cudaMemcpyHostToDevice));
    there.pixels = static_cast<const std::uint8_t*>(pixels);
    check(neck::launch_resize(there, nullptr));
    check(cudaMemcpy(job.target, there.target, target_bytes(job), cudaMemcpyDeviceToHost));
    check(cudaFree(there.target));
    check(cudaFree(pixels));
}

}  // namespace

namespace neck {

// what preprocess.cpp links and does not call here
Pixels decode(std::string_view /*file*/, const ImageLimits& /*limits*/) { throw ImageFault("cannot be read here; build engines/cpp"); }

}  // namespace neck

int main() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        std::cerr << "no NVIDIA driver or GPU\n";
        return not_run;
    }
    try {
        test_resizes(resize_on_gpu);
    } catch (const std::exception& error) {
        expect(false, error.what());
    }
    return failures == 0 ? 0 : 1;
}
