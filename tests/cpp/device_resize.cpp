// The kernel's body as plain C++, queued on the fake's streams.
#include "gpu/device_resize.hpp"
#include "fake.hpp"

namespace neck {

cudaError_t launch_resize(const DeviceResize& job, cudaStream_t stream) {
    if (fake::fails("launch_resize")) {
        return cudaErrorLaunchFailure;
    }
    fake::queue(stream, [job] {
        for (std::int64_t row = 0; row < job.target_height; ++row) {
            for (std::int64_t column = 0; column < job.target_width; ++column) {
                resize_pixel(job, row, column);
            }
        }
    });
    return cudaSuccess;
}

}  // namespace neck
