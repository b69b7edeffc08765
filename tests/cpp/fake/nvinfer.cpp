#include "NvInferRuntime.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>
#include <thread>

#include "fake.hpp"

namespace fake {

struct Engine {
    std::shared_ptr<const Program> program;
    nvinfer1::ILogger& logger;

    const TensorFacts& of(const char* name) const {
        return *std::find_if(program->tensors.begin(), program->tensors.end(),
                             [&](const TensorFacts& tensor) { return tensor.name == name; });
    }
};

struct Context {
    Context(std::shared_ptr<const Program> given, nvinfer1::ILogger& taken)
        : program(std::move(given)), logger(taken) {}

    std::shared_ptr<const Program> program;
    nvinfer1::ILogger& logger;
    std::map<std::string, Bound> bound;
    Reach reach{*program};
    char* scratch = nullptr;
    std::int64_t scratch_size = 0;
    nvinfer1::IRuntimeCache* cache = nullptr;
    bool lazy = false;  ///< kernels of a shape are still compiled when its first run is over
    std::shared_ptr<int> changes = std::make_shared<int>(0);
    std::atomic<int> users{0};
    bool broken = false;
};

/// A call of a context: aborts where another thread is in one. TensorRT's are for one thread at a time.
class Use {
public:
    explicit Use(Context& context) : context_(enter(context)) {}
    ~Use() { context_.users.fetch_sub(1); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

private:
    static Context& enter(Context& context) {
        if (context.users.fetch_add(1) != 0) {
            std::fprintf(stderr, "fake: two threads use one context\n");
            std::abort();
        }
        std::this_thread::yield();  // so that another has the time
        return context;
    }

    Context& context_;
    const Lock lock_;  // after the look at who else is here
};

}  // namespace fake

namespace nvinfer1 {
namespace {

std::atomic<int> runtimes{0};

int version_part(std::size_t index) {
    const char* text = std::getenv("STAND_IN_VERSION");
    std::istringstream stream(text != nullptr ? text : "10.16.1.11");
    std::string part;
    for (std::size_t skipped = 0; skipped <= index; ++skipped) {
        std::getline(stream, part, '.');
    }
    return std::atoi(part.c_str());
}

Dims dims_of(const std::vector<std::int64_t>& shape) {
    Dims dims{static_cast<std::int32_t>(shape.size()), {}};
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

}  // namespace

IExecutionContext::~IExecutionContext() noexcept { fake::count(-1); }

bool IExecutionContext::setInputShape(char const* name, Dims const& dims) noexcept {
    const fake::Use use(*own);
    ++*own->changes;
    if (fake::fails("setInputShape")) {
        own->logger.log(ILogger::Severity::kERROR, "Error Code 3: API Usage Error\n (the shape is not in the profile)");
        return false;
    }
    for (const fake::TensorFacts& tensor : own->program->tensors) {
        fake::Bound& bound = own->bound[tensor.name];
        bound.shape = tensor.shape;
        if (tensor.name == name) {
            bound.shape.assign(dims.d, dims.d + dims.nbDims);
        } else if (tensor.shape[0] < 0) {
            bound.shape[0] = dims.d[0];
        }
    }
    return true;
}

bool IExecutionContext::setTensorAddress(char const* name, void* data) noexcept {
    const fake::Use use(*own);
    ++*own->changes;
    const bool aligned = reinterpret_cast<std::uintptr_t>(data) % 256 == 0;
    if (!aligned || fake::fails("setTensorAddress")) {
        own->logger.log(ILogger::Severity::kERROR, "Error Code 3: API Usage Error (the address is not aligned)");
        return false;
    }
    own->bound[name].data = data;
    return true;
}

void IExecutionContext::setDeviceMemoryV2(void* memory, std::int64_t size) noexcept {
    const fake::Use use(*own);
    own->scratch = static_cast<char*>(memory);
    own->scratch_size = size;
}

bool IExecutionContext::enqueueV3(cudaStream_t stream) noexcept {
    const fake::Use use(*own);
    const bool whole = own->scratch_size >= own->program->scratch &&
                       std::all_of(own->bound.begin(), own->bound.end(),
                                   [](const auto& entry) { return entry.second.data != nullptr; });
    const bool forbidden = fake::capturing(stream) && own->program->allocates;
    if (fake::capturing(stream) && own->lazy) {
        std::fprintf(stderr, "fake: a CUDA graph is captured of kernels that serve until others are compiled\n");
        std::abort();
    }
    // a context whose run failed is of no more use, as after an error of CUDA's
    own->broken = own->broken || fake::fails("enqueueV3");
    if (!whole || forbidden || own->broken) {
        own->logger.log(ILogger::Severity::kERROR, "Error Code 1: Cuda Runtime\n(out of memory)");
        return false;
    }
    if (own->cache != nullptr) {
        const std::string kernel = "kernels of batch " + std::to_string(own->bound.begin()->second.shape[0]) + "\n";
        if (own->cache->own.find(kernel) == std::string::npos) {
            own->cache->own += kernel;
            std::fprintf(stdout, "fake: compiles %s", kernel.c_str());
        }
    }
    if (own->scratch != nullptr) {
        fake::spoil(own->scratch, static_cast<std::size_t>(own->scratch_size), stream);
    }
    const auto work = [program = own->program, bound = own->reach.bring(own->bound, stream), changes = own->changes,
                       now = *own->changes, captured = fake::capturing(stream)] {
        if (captured && *changes != now) {
            std::fprintf(stderr, "fake: a CUDA graph is run after its context was changed\n");
            std::abort();
        }
        program->run(bound);
    };
    fake::queue(stream, work);
    own->reach.take_back(own->bound, stream);
    return true;
}

bool IExecutionContext::isStreamCapturable(cudaStream_t /*stream*/) const noexcept { return !own->program->allocates; }

IRuntimeConfig::~IRuntimeConfig() noexcept { fake::count(-1); }

void IRuntimeConfig::setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept {
    allocation = strategy;
}

void IRuntimeConfig::setDynamicShapesKernelSpecializationStrategy(
    DynamicShapesKernelSpecializationStrategy strategy) noexcept {
    specialization = strategy;
}

bool IRuntimeConfig::setCudaGraphStrategy(CudaGraphStrategy /*strategy*/) noexcept {
    return !fake::fails("setCudaGraphStrategy");
}

IRuntimeCache* IRuntimeConfig::createRuntimeCache() const noexcept {
    fake::count(1);
    return new IRuntimeCache;
}

bool IRuntimeConfig::setRuntimeCache(IRuntimeCache const& given) noexcept {
    cache = const_cast<IRuntimeCache*>(&given);  // NOLINT: as RTX, it is filled while contexts run
    return !fake::fails("setRuntimeCache");
}

IHostMemory::~IHostMemory() noexcept { fake::count(-1); }

void* IHostMemory::data() const noexcept { return const_cast<char*>(own.data()); }  // NOLINT: TensorRT's signature

std::size_t IHostMemory::size() const noexcept { return own.size(); }

IRuntimeCache::~IRuntimeCache() noexcept { fake::count(-1); }

IHostMemory* IRuntimeCache::serialize() const noexcept {
    fake::count(1);
    auto* memory = new IHostMemory;
    memory->own = own;
    return memory;
}

bool IRuntimeCache::deserialize(void const* blob, std::size_t size) noexcept {
    own.assign(static_cast<char const*>(blob), size);
    return !fake::fails("deserialize");
}

ICudaEngine::~ICudaEngine() noexcept { fake::count(-1); }

std::int32_t ICudaEngine::getNbIOTensors() const noexcept {
    return static_cast<std::int32_t>(own->program->tensors.size());
}

char const* ICudaEngine::getIOTensorName(std::int32_t index) const noexcept {
    return own->program->tensors[static_cast<std::size_t>(index)].name.c_str();
}

Dims ICudaEngine::getTensorShape(char const* name) const noexcept { return dims_of(own->of(name).shape); }

DataType ICudaEngine::getTensorDataType(char const* name) const noexcept { return own->of(name).type; }

TensorIOMode ICudaEngine::getTensorIOMode(char const* name) const noexcept {
    return own->of(name).input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
}

Dims ICudaEngine::getProfileShape(char const* name, std::int32_t /*profile*/,
                                  OptProfileSelector select) const noexcept {
    Dims dims = dims_of(own->of(name).shape);
    dims.d[0] = own->of(name).batch[static_cast<std::size_t>(select)];
    return dims;
}

std::int64_t ICudaEngine::getDeviceMemorySizeV2() const noexcept { return own->program->scratch; }

IExecutionContext* ICudaEngine::createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept {
    if (fake::fails("createExecutionContext") || strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED) {
        own->logger.log(ILogger::Severity::kERROR, "Error Code 2: OutOfMemory");
        return nullptr;
    }
    fake::count(1);
    auto* context = new IExecutionContext;
    context->own.reset(new fake::Context(own->program, own->logger));
    context->own->lazy = own->program->rtx;
    return context;
}

IExecutionContext* ICudaEngine::createExecutionContext(IRuntimeConfig* config) noexcept {
    IExecutionContext* context = createExecutionContext(config->allocation);
    if (context != nullptr) {
        context->own->lazy = config->specialization == DynamicShapesKernelSpecializationStrategy::kLAZY;
        context->own->cache = config->cache;
    }
    return context;
}

IRuntimeConfig* ICudaEngine::createRuntimeConfig() noexcept {
    if (fake::fails("createRuntimeConfig")) {
        own->logger.log(ILogger::Severity::kERROR, "Error Code 2: OutOfMemory (runtime config)");
        return nullptr;
    }
    fake::count(1);
    return new IRuntimeConfig;
}

IRuntime::~IRuntime() noexcept {
    --runtimes;
    fake::count(-1);
}

void IRuntime::setEngineHostCodeAllowed(bool allowed) noexcept { host_code = allowed; }

ICudaEngine* IRuntime::deserializeCudaEngine(void const* blob, std::size_t size) noexcept {
    auto program = fake::read_program({static_cast<const char*>(blob), size});
    if (!program || fake::fails("deserializeCudaEngine")) {
        logger.log(ILogger::Severity::kERROR, "Error Code 4: Internal Error (the plan is\ncorrupt)");
        return nullptr;
    }
    if (program->lean && !host_code) {
        logger.log(ILogger::Severity::kERROR, "Error Code 3: API Usage Error (host code is not allowed)");
        return nullptr;
    }
    if (!program->warning.empty()) {
        logger.log(ILogger::Severity::kWARNING, program->warning.c_str());
    }
    fake::count(1);
    auto* engine = new ICudaEngine;
    engine->own.reset(new fake::Engine{std::move(program), logger});
    return engine;
}

IRuntime* createInferRuntime(ILogger& logger) noexcept {
    if (fake::fails("createInferRuntime")) {
        logger.log(ILogger::Severity::kERROR, "CUDA initialization failure");
        return nullptr;
    }
    if (runtimes++ > 0) {  // as TensorRT-RTX 1.7 says it
        logger.log(ILogger::Severity::kWARNING,
                   "The logger passed into createInferRuntime differs from one already registered for an existing "
                   "builder, runtime, or refitter.");
    }
    fake::count(1);
    return new IRuntime(logger);
}

}  // namespace nvinfer1

std::int32_t getInferLibMajorVersion() noexcept { return nvinfer1::version_part(0); }
std::int32_t getInferLibMinorVersion() noexcept { return nvinfer1::version_part(1); }
std::int32_t getInferLibPatchVersion() noexcept { return nvinfer1::version_part(2); }
std::int32_t getInferLibBuildVersion() noexcept { return nvinfer1::version_part(3); }
