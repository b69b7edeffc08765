#include "gpu/device_resize.hpp"

namespace neck {
namespace {

__global__ void resize(const DeviceResize job) {
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
    if (row < job.target_height && column < job.target_width) {
        resize_pixel(job, row, column);
    }
}

}  // namespace

cudaError_t launch_resize(const DeviceResize& job, cudaStream_t stream) {
    const dim3 block(32, 8);
    const dim3 grid(static_cast<unsigned>((job.target_width + block.x - 1) / block.x),
                    static_cast<unsigned>((job.target_height + block.y - 1) / block.y));
    resize<<<grid, block, 0, stream>>>(job);
    return cudaGetLastError();
}

}  // namespace neck
