// The kernel's body as plain C++, queued on the stand-in's streams.
#include "gpu/device_resize.hpp"
#include "stand_in.hpp"

namespace neck {

cudaError_t launch_resize(const DeviceResize& job, cudaStream_t stream) {
    if (stand_in::fails("launch_resize")) {
        return cudaErrorLaunchFailure;
    }
    stand_in::queue(stream, [job] {
        for (std::int64_t row = 0; row < job.target_height; ++row) {
            for (std::int64_t column = 0; column < job.target_width; ++column) {
                resize_pixel(job, row, column);
            }
        }
    });
    return cudaSuccess;
}

}  // namespace neck
