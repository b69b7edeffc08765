#pragma once

#include <NvInferRuntime.h>

#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "plan/flavor.hpp"
#include "neck/manifest.hpp"
#include "neck/tensor.hpp"

namespace neck {

/// Keeps what TensorRT warns of, and its last error.
class Logger : public nvinfer1::ILogger {
public:
    void log(Severity severity, nvinfer1::AsciiChar const* message) noexcept override;

    /// The last error, or that none was given.
    std::string failure() const;

    std::vector<std::string> warnings() const;

private:
    mutable std::mutex mutex_;  // TensorRT logs from threads of its own
    std::string failure_ = "TensorRT reported no reason";
    std::vector<std::string> warnings_;
};

/// A deserialized plan, whose weights all contexts share; the engine goes first, the logger last.
struct LoadedEngine {
    std::unique_ptr<Logger> logger;
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    RuntimeConfig config;
    std::vector<Port> inputs;
    std::vector<Port> outputs;
    std::mutex making{};  ///< held while a context is made: that may be in any thread
};

/// Loads a plan that passed the checks.
/// \param version of TensorRT, for messages.
/// \throws Error TensorRT cannot load it, or its tensors are not the manifest's.
std::shared_ptr<LoadedEngine> load_engine(const std::filesystem::path& plan, const Manifest& manifest,
                                          const std::string& version);

/// A context that runs in memory which the caller gives.
/// \throws Error
std::unique_ptr<nvinfer1::IExecutionContext> make_context(LoadedEngine& loaded, void* memory, std::int64_t bytes,
                                                          const std::string& plan);

}  // namespace neck
