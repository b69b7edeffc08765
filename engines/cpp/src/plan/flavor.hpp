#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <string_view>

namespace neck {

/// `tensorrt` or `rtx`: which of them this library was built for. What differs between the two is in this file.
std::string flavor_here();

/// What an engine's contexts are made with; must outlive them. TensorRT needs nothing.
///
/// TensorRT-RTX compiles the kernels of a shape while it runs, by default in the background: a CUDA graph would keep
/// the slower ones that serve meanwhile. So it is told to finish them in the first run of each shape.
struct RuntimeConfig {
    std::shared_ptr<void> cache;   ///< of the kernels that were compiled
    std::shared_ptr<void> config;  ///< goes before the cache
};

/// \param cached what a cache gave before; \param taken gets whether it was of use.
/// \param own_graphs TensorRT-RTX captures CUDA graphs of its own.
/// \return nothing in it where TensorRT gives none; its log says why.
RuntimeConfig make_runtime_config(nvinfer1::ICudaEngine& engine, std::string_view cached, bool own_graphs, bool& taken);

/// What was compiled so far; empty where there is no cache.
std::string cached_kernels(const RuntimeConfig& config);

/// A context that runs in memory which the caller gives; nothing where TensorRT gives none.
std::unique_ptr<nvinfer1::IExecutionContext> create_context(nvinfer1::ICudaEngine& engine, const RuntimeConfig& config);

/// Whether a context's run may be captured: a TensorRT-RTX plan that allocates while it runs may not.
bool is_capturable(const nvinfer1::IExecutionContext& context, cudaStream_t stream);

}  // namespace neck
