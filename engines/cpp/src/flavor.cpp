#include "flavor.hpp"

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

RuntimeConfig make_runtime_config(nvinfer1::ICudaEngine& engine) {
    std::shared_ptr<nvinfer1::IRuntimeConfig> config(engine.createRuntimeConfig());
    if (config) {
        config->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
        config->setDynamicShapesKernelSpecializationStrategy(
            nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
    }
    return config;
}

std::unique_ptr<nvinfer1::IExecutionContext> create_context(nvinfer1::ICudaEngine& engine,
                                                            const RuntimeConfig& config) {
    if (!config) {
        return nullptr;
    }
    return std::unique_ptr<nvinfer1::IExecutionContext>(
        engine.createExecutionContext(static_cast<nvinfer1::IRuntimeConfig*>(config.get())));
}

bool is_capturable(const nvinfer1::IExecutionContext& context, cudaStream_t stream) {
    return ask_capturable(context, stream, 0);
}

#else

std::string flavor_here() { return "tensorrt"; }

RuntimeConfig make_runtime_config(nvinfer1::ICudaEngine& /*engine*/) { return nullptr; }

std::unique_ptr<nvinfer1::IExecutionContext> create_context(nvinfer1::ICudaEngine& engine,
                                                            const RuntimeConfig& /*config*/) {
    return std::unique_ptr<nvinfer1::IExecutionContext>(
        engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
}

bool is_capturable(const nvinfer1::IExecutionContext& /*context*/, cudaStream_t /*stream*/) { return true; }

#endif

}  // namespace neck
