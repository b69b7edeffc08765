#include "plan/checks.hpp"

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <string_view>
#include <vector>

#include "neck/error.hpp"
#include "files/text.hpp"

namespace neck {
namespace {

/// The numbers that a version begins with: `10.16.1.11`, `10.5.0` of a wheel, `10.7.0.post1`.
std::vector<int> release_numbers(std::string_view text) {
    std::vector<int> numbers;
    const char* at = text.data();
    const char* const end = at + text.size();
    while (at != end && *at >= '0' && *at <= '9') {
        int number = 0;
        const auto [next, error] = std::from_chars(at, end, number);
        if (error != std::errc()) {
            return {};
        }
        numbers.push_back(number);
        if (next == end || *next != '.') {
            break;
        }
        at = next + 1;
    }
    return numbers;
}

/// What TensorRT-RTX serves: neither the data center's GPUs between Ada and RTX Blackwell (9.0, 10.x) nor Jetson's
/// (8.7, 11.0).
bool serves_rtx(const Gpu& gpu) {
    constexpr std::array<int, 4> known{75, 80, 86, 89};
    const int number = gpu.major * 10 + gpu.minor;
    return gpu.major >= 12 || std::find(known.begin(), known.end(), number) != known.end();
}

}  // namespace

std::string version_here() {
    return format("%d.%d.%d.%d", getInferLibMajorVersion(), getInferLibMinorVersion(), getInferLibPatchVersion(),
                  getInferLibBuildVersion());
}

void check_version(const std::filesystem::path& plan, const Manifest& manifest, const std::string& flavor,
                   const std::string& version) {
    if (manifest.flavor != flavor) {
        throw Error(plan.string() + ": the plan was built for --flavor " + manifest.flavor +
                    ", but this program was built for " + flavor + "; build the plan with `neck-export trt --flavor " +
                    flavor + "`, or build this program for " + manifest.flavor);
    }
    std::vector<int> built = release_numbers(manifest.tensorrt_version);
    std::vector<int> here = release_numbers(version);
    if (built.size() < 3) {
        throw Error(manifest.path.string() + ": the manifest is damaged (" + repr(manifest.tensorrt_version) +
                    " is not a TensorRT version such as 10.16.1.11); build " + plan.filename().string() + " again");
    }
    // the wheels 10.3 to 10.6 report three numbers, libraries four: as many are compared as both have
    const std::size_t known = std::min(built.size(), here.size());
    built.resize(known);
    here.resize(known);
    // RTX tells itself which plans it loads
    const bool compatible = manifest.version_compatible;
    if (flavor == "tensorrt" && built != here && !(compatible && here > built)) {
        throw Error(plan.string() + ": the plan needs TensorRT " + manifest.tensorrt_version +
                    (compatible ? " or later" : " exactly") + ", but " + version +
                    " is installed; build the plan again" +
                    (compatible ? ""
                                : ", and add --version-compatible if later TensorRT versions must load the plan too"));
    }
}

Gpu find_gpu(const std::filesystem::path& plan, int device) {
    int count = 0;
    const cudaError_t code = cudaGetDeviceCount(&count);
    if (code != cudaSuccess || count == 0) {
        cudaGetLastError();
        const std::string why = code == cudaSuccess ? "the number of GPUs is 0" : cudaGetErrorString(code);
        throw Error(plan.string() + ": this machine has no NVIDIA GPU that CUDA can use. CUDA reports: " + why +
                    ". Check the GPU and its driver with `nvidia-smi`, or run the plan on another machine with an "
                    "NVIDIA GPU");
    }
    if (device < 0 || device >= count) {
        throw Error(plan.string() + ": there is no GPU " + std::to_string(device) + "; the number of GPUs in this "
                    "machine is " +
                    std::to_string(count) + ", and they are numbered from 0");
    }
    Gpu gpu{"GPU " + std::to_string(device)};
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&gpu.major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&gpu.minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
        throw Error(plan.string() + ": CUDA cannot read the properties of GPU " + std::to_string(device) +
                    "; check with nvidia-smi that this GPU works");
    }
    gpu.name = properties.name;
    return gpu;
}

void check_gpu(const std::filesystem::path& plan, const Manifest& manifest, const Gpu& gpu,
               const std::string& version) {
    const std::vector<std::string>& built = manifest.compute_capabilities;
    const std::string here = gpu.capability();
    const bool rtx = manifest.flavor == "rtx";
    if (rtx && !serves_rtx(gpu)) {
        throw Error(plan.string() + ": TensorRT-RTX " + version + " does not support " + gpu.describe() +
                    "; build the plan again with --flavor tensorrt");
    }
    // RTX's default is 8.0 and later; TensorRT's hardware compatibility `same` is the rule without it, too
    const bool later = manifest.hardware_compatible == "ampere+" || built.empty();
    if (std::find(built.begin(), built.end(), here) != built.end() || (later && gpu.major >= 8)) {
        return;
    }
    const std::string wanted = later ? "8.0 or later" : joined(built, [](const std::string& each) { return each; });
    throw Error(plan.string() + ": the plan is for compute capability " + wanted + ", but the GPU is " +
                gpu.describe() + "; build the plan again " +
                (rtx ? "with --compute-capability " + here : "on this GPU"));
}

}  // namespace neck
