#include "plan/load.hpp"

#include <algorithm>
#include <optional>
#include <string_view>
#include <system_error>
#include <tuple>

#include "gpu/cuda.hpp"
#include "files/files.hpp"
#include "files/log.hpp"
#include "neck/error.hpp"
#include "files/text.hpp"

namespace neck {
namespace {

std::optional<DataType> type_of(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT:
            return DataType::float32;
        case nvinfer1::DataType::kHALF:
            return DataType::float16;
        case nvinfer1::DataType::kBF16:
            return DataType::bfloat16;
        case nvinfer1::DataType::kUINT8:
            return DataType::uint8;
        case nvinfer1::DataType::kINT32:
            return DataType::int32;
        case nvinfer1::DataType::kINT64:
            return DataType::int64;
        default:
            return std::nullopt;
    }
}

Shape shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + std::max(0, dims.nbDims)}; }

Port read_port(const nvinfer1::ICudaEngine& engine, const char* name, const std::filesystem::path& plan) {
    const Shape shape = shape_of(engine.getTensorShape(name));
    const auto type = type_of(engine.getTensorDataType(name));
    const bool fixed =
        !shape.empty() && std::all_of(shape.begin() + 1, shape.end(), [](auto side) { return side >= 0; });
    if (!type) {
        throw Error(plan.string() + ": the data type of the plan's tensor " + name +
                    " is not supported. The supported types are float32, float16, bfloat16, uint8, int32 and int64. "
                    "Build the plan from an ONNX file that `neck-export onnx` wrote");
    }
    if (!fixed) {
        throw Error(plan.string() + ": the plan's tensor " + name + " has the shape " + to_text(shape) +
                    ", which is not supported. The first dimension must be the batch, and every later dimension must "
                    "have a fixed size instead of -1. Build the plan from an ONNX file that `neck-export onnx` wrote");
    }
    Port port{name, *type, shape, shape[0], shape[0], shape[0]};
    if (shape[0] < 0 && engine.getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT) {
        const auto batch = [&](nvinfer1::OptProfileSelector select) {
            const nvinfer1::Dims dims = engine.getProfileShape(name, 0, select);
            return dims.nbDims > 0 ? dims.d[0] : 0;
        };
        port.smallest_batch = batch(nvinfer1::OptProfileSelector::kMIN);
        port.optimum_batch = batch(nvinfer1::OptProfileSelector::kOPT);
        port.largest_batch = batch(nvinfer1::OptProfileSelector::kMAX);
    }
    return port;
}

using Spec = std::tuple<std::string, std::string, Shape>;

/// How TensorRT's warning begins at the second runtime of a process; every engine has a logger of its own on purpose.
constexpr std::string_view other_logger = "The logger passed into";

std::vector<Spec> sorted_specs(const std::vector<Port>& ports, const std::vector<Port>& more) {
    std::vector<Spec> specs;
    for (const auto* list : {&ports, &more}) {
        for (const Port& port : *list) {
            specs.emplace_back(port.name, name_of(port.type), port.shape);
        }
    }
    std::sort(specs.begin(), specs.end());
    return specs;
}

std::vector<Spec> sorted_specs(const Manifest& manifest) {
    std::vector<Spec> specs;
    for (const auto* list : {&manifest.inputs, &manifest.outputs}) {
        for (const Manifest::Spec& spec : *list) {
            specs.emplace_back(spec.name, spec.dtype, spec.shape);
        }
    }
    std::sort(specs.begin(), specs.end());
    return specs;
}

void read_ports(LoadedEngine& loaded, const std::filesystem::path& plan, const Manifest& manifest) {
    for (int index = 0; index < loaded.engine->getNbIOTensors(); ++index) {
        const char* name = loaded.engine->getIOTensorName(index);
        const bool input = loaded.engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
        (input ? loaded.inputs : loaded.outputs).push_back(read_port(*loaded.engine, name, plan));
    }
    if (sorted_specs(loaded.inputs, loaded.outputs) != sorted_specs(manifest)) {
        throw Error(manifest.path.string() + ": the tensors in the manifest differ from the engine's; build " +
            plan.filename().string() +
                    " again");
    }
    if (loaded.inputs.size() != 1) {
        throw Error(plan.string() + ": the plan has " + std::to_string(loaded.inputs.size()) +
                    " inputs, but must have one, `image`; build the plan from a file that `neck-export onnx` wrote");
    }
    for (Port& output : loaded.outputs) {
        if (output.shape[0] < 0) {
            output.smallest_batch = loaded.inputs[0].smallest_batch;
            output.optimum_batch = loaded.inputs[0].optimum_batch;
            output.largest_batch = loaded.inputs[0].largest_batch;
        }
    }
}

}  // namespace

void Logger::log(Severity severity, nvinfer1::AsciiChar const* message) noexcept {
    const bool failed = severity == Severity::kERROR || severity == Severity::kINTERNAL_ERROR;
    if (!failed && (severity != Severity::kWARNING ||
                    std::string_view(message).find(other_logger) != std::string_view::npos)) {
        return;
    }
    try {
        const std::string line = one_line(message);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (failed) {
                failure_ = line;
            } else {
                warnings_.push_back(line);
            }
        }
        log_line(failed ? LogLevel::error : LogLevel::warning, (failed ? "TensorRT: " : "TensorRT warning: ") + line);
    } catch (...) {  // NOLINT(bugprone-empty-catch): out of host memory, a line of the log is lost, no more
    }
}

std::string Logger::failure() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return failure_;
}

std::vector<std::string> Logger::warnings() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return warnings_;
}

std::shared_ptr<LoadedEngine> load_engine(const std::filesystem::path& plan, const Manifest& manifest,
                                          const std::string& version) {
    auto shared = std::make_shared<LoadedEngine>();
    LoadedEngine& loaded = *shared;
    loaded.logger = std::make_unique<Logger>();
    loaded.runtime.reset(nvinfer1::createInferRuntime(*loaded.logger));
    const auto refused = [&] {
        return Error(plan.string() + ": TensorRT " + version + " cannot load the plan "
            "(" + loaded.logger->failure() + "); " +
                     memory_text());
    };
    if (!loaded.runtime) {
        throw refused();
    }
    // a version-compatible plan brings its own runtime; its SHA-256 is checked
    loaded.runtime->setEngineHostCodeAllowed(manifest.version_compatible);
    try {
        // in memory of our own until TensorRT has it: a mapped file that is cut meanwhile would end the process
        const FileBytes file = read_file(plan);
        loaded.engine.reset(loaded.runtime->deserializeCudaEngine(file.data(), file.size()));
    } catch (const std::system_error& error) {
        throw Error(plan.string() + ": the file cannot be read (" + error.code().message() +
                    "); check its permissions");
    }
    if (!loaded.engine) {
        throw refused();
    }
    read_ports(loaded, plan, manifest);
    return shared;
}

std::unique_ptr<nvinfer1::IExecutionContext> make_context(LoadedEngine& loaded, void* memory, std::int64_t bytes,
                                                          const std::string& plan) {
    const std::lock_guard<std::mutex> lock(loaded.making);
    std::unique_ptr<nvinfer1::IExecutionContext> context = create_context(*loaded.engine, loaded.config);
    if (!context) {
        throw Error(plan + ": no execution context can be created (" + loaded.logger->failure() + "); " +
            memory_text());
    }
    if (bytes > 0) {
        context->setDeviceMemoryV2(memory, bytes);
    }
    return context;
}

}  // namespace neck
