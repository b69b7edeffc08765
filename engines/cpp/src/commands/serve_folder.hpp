#pragma once

#include <cstdint>
#include <filesystem>

#include "commands/command.hpp"
#include "neck/engine.hpp"

namespace neck {

struct FolderOptions {
    std::int64_t batch = 0;  ///< images in one run; 0: the plan's optimum
    int threads = 2;         ///< that read images and write features
    int contexts = 2;        ///< so that one copies while another runs
};

/// Computes the features of a folder's images: OUT/NAME.safetensors for each, whole or not there.
///
/// Features that are there already are kept, so that a call after one that was killed goes on, unless they are damaged or
/// their image was changed. For each image that fails there is one line on stderr.
/// \return Exit::failed if any image failed.
/// \throws Error a folder that cannot be used, or that holds features of another plan.
Exit serve_folder(const std::filesystem::path& plan, const std::filesystem::path& in, const std::filesystem::path& out,
                  const EngineOptions& engine, const FolderOptions& options);

}  // namespace neck
