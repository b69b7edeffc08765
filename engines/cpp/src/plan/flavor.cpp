#include "plan/flavor.hpp"

namespace neck {

#ifdef NECK_TENSORRT_RTX

namespace {

// headers of TensorRT-RTX may lack it (a switch of theirs); then the capture itself tells
template <typename Context>
auto ask_capturable(const Context& context, cudaStream_t stream, int /*preferred*/)
    -> decltype(context.isStreamCapturable(stream)) {
    return context.isStreamCapturable(stream);
}

template <typename Context>
bool ask_capturable(const Context& /*context*/, cudaStream_t /*stream*/, long /*otherwise*/) {
    return true;
}

}  // namespace

std::string flavor_here() { return "rtx"; }

RuntimeConfig make_runtime_config(nvinfer1::ICudaEngine& engine, std::string_view cached, bool own_graphs,
                                  bool& taken) {
    std::shared_ptr<nvinfer1::IRuntimeConfig> config(engine.createRuntimeConfig());
    if (!config) {
        return {};
    }
    config->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
    config->setDynamicShapesKernelSpecializationStrategy(nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
    if (own_graphs && !config->setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE)) {
        return {};
    }
    std::shared_ptr<nvinfer1::IRuntimeCache> cache(config->createRuntimeCache());
    if (cache) {
        taken = !cached.empty() && cache->deserialize(cached.data(), cached.size());
        if (!config->setRuntimeCache(*cache)) {
            cache.reset();
        }
    }
    return {cache, config};
}

std::string cached_kernels(const RuntimeConfig& config) {
    if (!config.cache) {
        return {};
    }
    const std::unique_ptr<nvinfer1::IHostMemory> memory(
        static_cast<nvinfer1::IRuntimeCache*>(config.cache.get())->serialize());
    return memory ? std::string(static_cast<const char*>(memory->data()), memory->size()) : std::string();
}

std::unique_ptr<nvinfer1::IExecutionContext> create_context(nvinfer1::ICudaEngine& engine,
                                                            const RuntimeConfig& config) {
    if (!config.config) {
        return nullptr;
    }
    return std::unique_ptr<nvinfer1::IExecutionContext>(
        engine.createExecutionContext(static_cast<nvinfer1::IRuntimeConfig*>(config.config.get())));
}

bool is_capturable(const nvinfer1::IExecutionContext& context, cudaStream_t stream) {
    return ask_capturable(context, stream, 0);
}

#else

std::string flavor_here() { return "tensorrt"; }

RuntimeConfig make_runtime_config(nvinfer1::ICudaEngine& /*engine*/, std::string_view /*cached*/, bool /*own_graphs*/,
                                  bool& /*taken*/) {
    return {};
}

std::string cached_kernels(const RuntimeConfig& /*config*/) { return {}; }

std::unique_ptr<nvinfer1::IExecutionContext> create_context(nvinfer1::ICudaEngine& engine,
                                                            const RuntimeConfig& /*config*/) {
    return std::unique_ptr<nvinfer1::IExecutionContext>(
        engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
}

bool is_capturable(const nvinfer1::IExecutionContext& /*context*/, cudaStream_t /*stream*/) { return true; }

#endif

}  // namespace neck
