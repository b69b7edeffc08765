// Plans that compute for real: an ONNX file, run by ONNX Runtime, whose library STAND_IN_ORT names.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "fake.hpp"

namespace fake {
namespace {

const OrtApi* load_api() {
    const char* path = std::getenv("STAND_IN_ORT");
    void* library = path != nullptr ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    using Base = const OrtApiBase* (*)();
    const auto base = library != nullptr ? reinterpret_cast<Base>(dlsym(library, "OrtGetApiBase")) : nullptr;
    return base != nullptr ? base()->GetApi(ORT_API_VERSION) : nullptr;
}

const OrtApi* api() {
    static const OrtApi* only = load_api();
    return only;
}

/// \return whether the call went well; what went wrong is printed.
bool good(OrtStatus* status) {
    if (status == nullptr) {
        return true;
    }
    std::fprintf(stderr, "fake: %s\n", api()->GetErrorMessage(status));
    api()->ReleaseStatus(status);
    return false;
}

template <typename Handle>
using Held = std::unique_ptr<Handle, void (*)(Handle*)>;

const std::map<ONNXTensorElementDataType, nvinfer1::DataType> types{
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, nvinfer1::DataType::kFLOAT},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, nvinfer1::DataType::kHALF},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, nvinfer1::DataType::kBF16},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, nvinfer1::DataType::kUINT8}};

ONNXTensorElementDataType onnx_type(nvinfer1::DataType type) {
    for (const auto& [theirs, ours] : types) {
        if (ours == type) {
            return theirs;
        }
    }
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

class OnnxProgram : public Program {
public:
    bool load(std::string_view plan) {
        OrtEnv* environment = nullptr;
        OrtSessionOptions* options = nullptr;
        OrtSession* session = nullptr;
        if (!good(api()->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "fake", &environment))) {
            return false;
        }
        environment_.reset(environment);
        if (!good(api()->CreateSessionOptions(&options))) {
            return false;
        }
        const Held<OrtSessionOptions> held(options, api()->ReleaseSessionOptions);
        if (!good(api()->SetIntraOpNumThreads(options, 1)) ||
            !good(api()->CreateSessionFromArray(environment, plan.data(), plan.size(), options, &session))) {
            return false;
        }
        session_.reset(session);
        std::size_t inputs = 0;
        std::size_t outputs = 0;
        bool right = good(api()->SessionGetInputCount(session, &inputs)) &&
                     good(api()->SessionGetOutputCount(session, &outputs));
        for (std::size_t index = 0; right && index < inputs + outputs; ++index) {
            right = add_tensor(index < inputs, index < inputs ? index : index - inputs);
        }
        return right;
    }

    void run(const std::map<std::string, Bound>& bound) const override {
        OrtMemoryInfo* memory = nullptr;
        require(good(api()->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory)));
        const Held<OrtMemoryInfo> held(memory, api()->ReleaseMemoryInfo);
        std::vector<Held<OrtValue>> values;
        std::vector<const char*> names[2];
        std::vector<OrtValue*> raw[2];
        for (const TensorFacts& tensor : tensors) {
            const Bound& at = bound.at(tensor.name);
            OrtValue* value = nullptr;
            require(good(api()->CreateTensorWithDataAsOrtValue(
                memory, at.data, elements(at.shape) * element_size(tensor.type), at.shape.data(), at.shape.size(),
                onnx_type(tensor.type), &value)));
            values.emplace_back(value, api()->ReleaseValue);
            names[tensor.input ? 0 : 1].push_back(tensor.name.c_str());
            raw[tensor.input ? 0 : 1].push_back(value);
        }
        require(good(api()->Run(session_.get(), nullptr, names[0].data(), raw[0].data(), raw[0].size(), names[1].data(),
                                raw[1].size(), raw[1].data())));
    }

private:
    static void require(bool right) {
        if (!right) {
            std::abort();
        }
    }

    bool add_tensor(bool input, std::size_t index) {
        OrtAllocator* allocator = nullptr;
        char* name = nullptr;
        OrtTypeInfo* info = nullptr;
        if (!good(api()->GetAllocatorWithDefaultOptions(&allocator)) ||
            !good(input ? api()->SessionGetInputName(session_.get(), index, allocator, &name)
                        : api()->SessionGetOutputName(session_.get(), index, allocator, &name)) ||
            !good(input ? api()->SessionGetInputTypeInfo(session_.get(), index, &info)
                        : api()->SessionGetOutputTypeInfo(session_.get(), index, &info))) {
            return false;
        }
        const Held<OrtTypeInfo> held(info, api()->ReleaseTypeInfo);
        const OrtTensorTypeAndShapeInfo* shape = nullptr;
        ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        std::size_t sides = 0;
        TensorFacts tensor;
        tensor.name = name;
        tensor.input = input;
        bool right = good(api()->AllocatorFree(allocator, name)) &&
                     good(api()->CastTypeInfoToTensorInfo(info, &shape)) &&
                     good(api()->GetTensorElementType(shape, &type)) && good(api()->GetDimensionsCount(shape, &sides));
        tensor.shape.resize(sides);
        right = right && good(api()->GetDimensions(shape, tensor.shape.data(), sides)) && types.count(type) > 0;
        if (!right) {
            return false;
        }
        tensor.type = types.at(type);
        if (tensor.shape[0] < 0) {  // a plan has a range of batches, an ONNX file has not
            tensor.batch = {1, 2, 4};
        }
        tensors.push_back(tensor);
        return true;
    }

    Held<OrtEnv> environment_{nullptr, api()->ReleaseEnv};
    Held<OrtSession> session_{nullptr, api()->ReleaseSession};
};

}  // namespace

std::unique_ptr<Program> read_onnx(std::string_view plan) {
    if (api() == nullptr) {
        std::fprintf(stderr, "fake: STAND_IN_ORT names no ONNX Runtime of this version\n");
        return nullptr;
    }
    auto program = std::make_unique<OnnxProgram>();
    return program->load(plan) ? std::move(program) : nullptr;
}

}  // namespace fake
