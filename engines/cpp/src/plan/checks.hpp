#pragma once

#include <filesystem>
#include <string>

#include "neck/manifest.hpp"

namespace neck {

/// A GPU as messages name it.
struct Gpu {
    std::string name;
    int major = 0;
    int minor = 0;

    std::string capability() const { return std::to_string(major) + "." + std::to_string(minor); }
    std::string describe() const { return name + " (compute capability " + capability() + ")"; }
};

/// The version of the TensorRT that is loaded, such as `10.16.1.11`.
std::string version_here();

/// \throws Error the plan is of another flavor, or of a TensorRT whose plans this one does not load.
void check_version(const std::filesystem::path& plan, const Manifest& manifest, const std::string& flavor,
                   const std::string& version);

/// Asks CUDA before anything of TensorRT is called: without a driver libnvinfer_lean crashes.
/// \throws Error no GPU, or none of that number.
Gpu find_gpu(const std::filesystem::path& plan, int device);

/// \throws Error a GPU that the plan was not built for.
void check_gpu(const std::filesystem::path& plan, const Manifest& manifest, const Gpu& gpu, const std::string& version);

}  // namespace neck
