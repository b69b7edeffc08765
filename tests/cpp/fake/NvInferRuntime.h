// A fake of the part of TensorRT that engines/cpp uses. Names, signatures and values are those of TensorRT 10 and
// 11 and TensorRT-RTX 1.2 and later; fake.hpp says how it behaves.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include <cuda_runtime_api.h>  // the fake's or CUDA's own

namespace fake {
struct Context;
struct Engine;
}  // namespace fake

namespace nvinfer1 {

using AsciiChar = char;

enum class DataType : std::int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kUINT8 = 5, kBF16 = 7, kINT64 = 8 };
enum class TensorIOMode : std::int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class OptProfileSelector : std::int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };
enum class CudaGraphStrategy : std::int32_t { kDISABLED = 0, kWHOLE_GRAPH_CAPTURE = 1 };
enum class DynamicShapesKernelSpecializationStrategy : std::int32_t { kLAZY = 0, kEAGER = 1, kNONE = 2 };
enum class ExecutionContextAllocationStrategy : std::int32_t { kSTATIC = 0, kON_PROFILE_CHANGE = 1, kUSER_MANAGED = 2 };

struct Dims {
    std::int32_t nbDims;
    std::int64_t d[8];
};

class ILogger {
public:
    enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, AsciiChar const* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IExecutionContext {
public:
    virtual ~IExecutionContext() noexcept;
    bool setInputShape(char const* name, Dims const& dims) noexcept;
    bool setTensorAddress(char const* name, void* data) noexcept;
    void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept;
    bool enqueueV3(cudaStream_t stream) noexcept;
    bool isStreamCapturable(cudaStream_t stream) const noexcept;

    std::unique_ptr<fake::Context> own;
};

class IHostMemory {
public:
    virtual ~IHostMemory() noexcept;
    void* data() const noexcept;
    std::size_t size() const noexcept;

    std::string own;
};

class IRuntimeCache {
public:
    virtual ~IRuntimeCache() noexcept;
    IHostMemory* serialize() const noexcept;
    bool deserialize(void const* blob, std::size_t size) noexcept;

    std::string own;  // of each batch that was run, once
};

class IRuntimeConfig {
public:
    virtual ~IRuntimeConfig() noexcept;
    void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept;
    void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy strategy) noexcept;

    bool setCudaGraphStrategy(CudaGraphStrategy strategy) noexcept;
    IRuntimeCache* createRuntimeCache() const noexcept;
    bool setRuntimeCache(IRuntimeCache const& cache) noexcept;

    IRuntimeCache* cache = nullptr;
    ExecutionContextAllocationStrategy allocation = ExecutionContextAllocationStrategy::kSTATIC;
    DynamicShapesKernelSpecializationStrategy specialization = DynamicShapesKernelSpecializationStrategy::kLAZY;
};

class ICudaEngine {
public:
    virtual ~ICudaEngine() noexcept;
    std::int32_t getNbIOTensors() const noexcept;
    char const* getIOTensorName(std::int32_t index) const noexcept;
    Dims getTensorShape(char const* name) const noexcept;
    DataType getTensorDataType(char const* name) const noexcept;
    TensorIOMode getTensorIOMode(char const* name) const noexcept;
    Dims getProfileShape(char const* name, std::int32_t profile, OptProfileSelector select) const noexcept;
    std::int64_t getDeviceMemorySizeV2() const noexcept;
    IExecutionContext* createExecutionContext(
        ExecutionContextAllocationStrategy strategy = ExecutionContextAllocationStrategy::kSTATIC) noexcept;
    IExecutionContext* createExecutionContext(IRuntimeConfig* config) noexcept;
    IRuntimeConfig* createRuntimeConfig() noexcept;

    std::unique_ptr<fake::Engine> own;
};

class IRuntime {
public:
    explicit IRuntime(ILogger& given) : logger(given) {}
    virtual ~IRuntime() noexcept;
    void setEngineHostCodeAllowed(bool allowed) noexcept;
    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept;

    ILogger& logger;
    bool host_code = false;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;

}  // namespace nvinfer1

extern "C" {
std::int32_t getInferLibMajorVersion() noexcept;
std::int32_t getInferLibMinorVersion() noexcept;
std::int32_t getInferLibPatchVersion() noexcept;
std::int32_t getInferLibBuildVersion() noexcept;
}
