// neck::Engine and neck::Pool on CUDA itself, with the fake of TensorRT: test_cuda FOLDER. Exit status 77: there is
// no driver or GPU. It reads no manifest: so it needs neither nlohmann-json, OpenSSL, libjpeg nor zlib.
#include <cuda_runtime_api.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <thread>

#include "gpu/cuda.hpp"
#include "images/decode.hpp"
#include "expect.hpp"
#include "files/files.hpp"
#include "neck/engine.hpp"
#include "neck/manifest.hpp"
#include "runs.hpp"
#include "fake.hpp"

namespace {

constexpr int not_run = 77;

const char* const plan_text =
    "fake\n"
    "input image float32 -1,3,2,2 1,2,4\n"
    "output half float16 -1,5,2,2\n"
    "output full float32 -1,5,2,2\n"
    "scratch 1000\n";

/// Why nothing can run here, or nothing.
std::string why_not() {
    int driver = 0;
    int here = 0;
    int count = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&here);
    const cudaError_t code = cudaGetDeviceCount(&count);
    if (driver == 0) {
        return "no NVIDIA driver";
    }
    if (code == cudaErrorInsufficientDriver) {
        return "the driver serves CUDA " + neck::driver_version("test") + ", this is of CUDA " +
               std::to_string(here / 1000) + "." + std::to_string(here % 1000 / 10);
    }
    if (code == cudaErrorNoDevice || (code == cudaSuccess && count == 0)) {
        return "no NVIDIA GPU";
    }
    return "";
}

void test_where_memory_lies(const std::string& plan) {
    neck::Engine engine(plan);
    const neck::OwnedStream stream = neck::make_stream("test");
    engine.infer(image_of(2, 7), stream.get());
    neck::dlpack::Managed* full = engine.to_dlpack("full");
    cudaPointerAttributes found{};
    neck::check(cudaPointerGetAttributes(&found, full->dl_tensor.data), "test");
    expect(found.type == cudaMemoryTypeDevice && found.device == full->dl_tensor.device.id, "DLPack's device");
    full->deleter(full);
}

/// Holds a stream until it is opened.
class Gate {
public:
    explicit Gate(cudaStream_t stream) { neck::check(cudaLaunchHostFunc(stream, wait, &open_), "test"); }
    ~Gate() { open(); }
    Gate(const Gate&) = delete;
    Gate& operator=(const Gate&) = delete;
    void open() { open_ = true; }

private:
    static void CUDART_CB wait(void* open) {
        while (!*static_cast<std::atomic<bool>*>(open)) {
            std::this_thread::yield();
        }
    }
    std::atomic<bool> open_{false};
};

/// Enqueue returns before the run ends, and finished() tells when it does.
void test_runs_are_not_waited_for(const std::string& plan, bool graph) {
    neck::EngineOptions options;
    options.cuda_graph = graph;
    neck::Engine engine(plan, options);
    const neck::OwnedStream stream = neck::make_stream("test");
    engine.infer(image_of(2, 1), stream.get());  // a graph is captured
    engine.copy_in(image_of(2, 3), stream.get());
    neck::check(cudaStreamSynchronize(stream.get()), "test");
    Gate gate(stream.get());
    engine.enqueue(2, stream.get());
    expect(cudaEventQuery(engine.finished()) == cudaErrorNotReady, "a run behind the gate is at work");
    cudaGetLastError();
    gate.open();
    neck::check(cudaEventSynchronize(engine.finished()), "test");
    expect(cudaStreamQuery(stream.get()) == cudaSuccess, "after finished() nothing is");
    expect(doubled(engine.copy_out(stream.get()), 2, 3), "the run's outputs");
}

}  // namespace

namespace neck {

/// The plan's, made up for the GPU that is here.
Manifest read_manifest(const std::filesystem::path& plan, bool /*hashes*/) {
    Manifest manifest;
    manifest.path = plan.string() + ".json";
    manifest.flavor = "tensorrt";
    manifest.tensorrt_version = "10.16.1.11";  // the fake's
    manifest.hardware_compatible = "ampere+";
    manifest.inputs = {{"image", "float32", {-1, 3, 2, 2}}};
    manifest.outputs = {{"half", "float16", {-1, 5, 2, 2}}, {"full", "float32", {-1, 5, 2, 2}}};
    int major = 0;
    int minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
    manifest.compute_capabilities = {std::to_string(major) + "." + std::to_string(minor)};
    return manifest;
}

// what the engine links and does not call here

const std::string& Manifest::plan_hash() const { return tensorrt_version; }

std::string sha256(const std::byte* /*data*/, std::size_t /*size*/) {
    throw Error("no SHA-256 is computed here; build engines/cpp");
}

Pixels decode(std::string_view /*file*/, const ImageLimits& /*limits*/) { throw ImageFault("cannot be read here; build engines/cpp"); }

}  // namespace neck

int main(int count, char** values) {
    if (count != 2) {
        return 2;
    }
    const std::string plan = (std::filesystem::path(values[1]) / "x.plan").string();
    std::ofstream(plan) << plan_text;
    const std::string problem = why_not();
    if (!problem.empty()) {
        expect_error([&] { neck::Engine engine(plan); }, "this machine has no NVIDIA GPU that CUDA can use");
        std::cerr << problem << "\n";
        return failures == 0 ? not_run : 1;
    }
    try {
        for (const bool graph : {false, true}) {
            const std::string how = graph ? " by CUDA graphs" : "";
            test_batches(plan, graph);
            std::cout << "batches over streams" << how << std::endl;
            test_callers_memory(plan, graph);
            std::cout << "inputs in the caller's memory" << how << std::endl;
            test_bound_outputs(plan, graph);
            std::cout << "outputs in the caller's memory" << how << std::endl;
            test_runs_are_not_waited_for(plan, graph);
            std::cout << "finished()" << how << std::endl;
        }
        test_dlpack(plan);
        test_where_memory_lies(plan);
        std::cout << "DLPack" << std::endl;
        test_many_threads(plan, 2, 4, 25, std::chrono::seconds(0));
        neck::check(cudaDeviceSynchronize(), "the device at the end");
    } catch (const std::exception& error) {
        expect(false, error.what());
    }
    expect(fake::alive() == 0, "nothing of TensorRT is left");
    return failures == 0 ? 0 : 1;
}
