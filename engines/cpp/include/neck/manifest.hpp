#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "neck/export.hpp"
#include "neck/tensor.hpp"

namespace neck {

/// The parts of a plan's manifest (X.plan.json) that decide whether and how it runs.
struct NECK_API Manifest {
    /// A file that it speaks of.
    struct File {
        std::string name;
        std::int64_t bytes = 0;
        std::string sha256;
    };
    /// An input or output; -1 is a dynamic batch.
    struct Spec {
        std::string name;
        std::string dtype;
        Shape shape;
    };

    std::filesystem::path path;
    std::string flavor;            ///< `tensorrt` or `rtx`
    std::string tensorrt_version;  ///< that built it
    std::string precision;         ///< `fp32`, `fp16`, `bf16`, `fp8` or `int8`
    std::string batch;             ///< `4` or `1:4:8`
    std::vector<std::string> compute_capabilities;
    bool version_compatible = false;
    std::string hardware_compatible;
    std::string verification;  ///< what was verified, in words
    std::vector<Spec> inputs;
    std::vector<Spec> outputs;
    std::vector<File> files;

    /// SHA-256 of the plan itself.
    const std::string& plan_hash() const;
};

/// Where the manifest of a plan lies: X.plan.json.
NECK_API std::filesystem::path manifest_path(const std::filesystem::path& plan);

/// Reads the manifest beside a plan and checks what needs no GPU: that both are whole and belong together.
/// \param hashes also compares SHA-256, which reads every byte.
/// \throws Error the first thing that is wrong, in the words of `neck-export`.
NECK_API Manifest read_manifest(const std::filesystem::path& plan, bool hashes = true);

}  // namespace neck
