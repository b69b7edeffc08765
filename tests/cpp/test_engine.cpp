// neck::Engine against the fakes: order on streams, graphs, batches, every call that can fail.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "gpu/cuda.hpp"
#include "gpu/device_resize.hpp"
#include "expect.hpp"
#include "neck/engine.hpp"
#include "images/resize.hpp"
#include "resizes.hpp"
#include "runs.hpp"
#include "tests.hpp"
#include "fake.hpp"

namespace {

using neck::OwnedStream;

/// The kernel's body as plain C++.
void resize_here(const neck::DeviceResize& job) {
    for (std::int64_t place = 0; place < job.target_height * job.target_width; ++place) {
        neck::resize_pixel(job, place / job.target_width, place % job.target_width);
    }
}

/// The kernels of this processor give the bits of the plain ones, on rows that end where their memory ends, too.
void test_kernels_of_the_processor() {
    for (const auto& [from, to] : std::vector<std::pair<neck::Size, neck::Size>>{
             {{1, 1}, {4, 3}}, {{3, 90}, {16, 16}}, {{61, 47}, {14, 28}}, {{200, 9}, {3, 8}}, {{9, 1000}, {2, 31}}}) {
        const neck::Tensor pixels = colors_of(from);
        const neck::PixelView view{reinterpret_cast<const std::uint8_t*>(pixels.data.data()), from,
                                   static_cast<std::size_t>(from.width) * 3};
        const neck::Taps down(from.height, to.height);
        const neck::Taps across(from.width, to.width);
        std::vector<std::vector<std::uint8_t>> made(2);
        for (const bool best : {false, true}) {
            const auto take = [&](std::int64_t /*row*/, const std::uint8_t* row) {
                made[best ? 1 : 0].insert(made[best ? 1 : 0].end(), row, row + to.width * 3);
            };
            neck::resize_rows(view, down, across, 0, to.height, take,
                              best ? neck::best_kernels() : neck::plain_kernels());
        }
        expect(made[0] == made[1], "the same bits by the plain kernels and by this processor's");
        expect(made[0].size() == static_cast<std::size_t>(to.height * to.width * 3), "all rows");
    }
}

void test_images_on_the_gpu(const std::string& plan) {
    neck::Engine engine(plan);
    const OwnedStream stream = neck::make_stream("test");
    const neck::Size size{11, 6};
    const neck::Tensor pixels = colors_of(size);
    constexpr std::size_t pitch = 32;
    const neck::DeviceMemory memory = neck::allocate(pitch * 11, "test");
    for (std::size_t row = 0; row < 11; ++row) {
        neck::check(cudaMemcpyAsync(memory.get() + row * pitch, pixels.data.data() + row * 18, 18,
                                    cudaMemcpyHostToDevice, stream.get()),
                    "test");
    }
    engine.copy_in(image_of(2, 3), stream.get());
    const neck::Fit fit = engine.copy_in_rgb8(memory.get(), size, pitch, stream.get(), 1);
    expect(fit.scale_y == 5.5 && fit.scale_x == 3 && fit.original.height == 11, "the fit");
    engine.enqueue(2, stream.get());
    const std::vector<float> found = engine.copy_out(stream.get())[1].to_floats();
    const std::vector<float> wanted = neck::Preprocessor(engine.input()).prepare(pixels).image.to_floats();
    bool near = found[0] == 6.25F;
    for (std::size_t index = 0; index < wanted.size(); ++index) {
        near = near && std::abs(found[20 + index] - (2 * wanted[index] + 0.25F)) < 4.02F / 255;
    }
    expect(near, "an image on the GPU is the second of a batch");
    expect_error([&] { engine.copy_in_rgb8(pixels.data.data(), size, pitch, stream.get()); },
                 "the memory for the image is on the host; pass memory of GPU 0 instead");
    expect_error([&] { engine.copy_in_rgb8(memory.get(), size, 17, stream.get()); },
                 "the pitch for copy_in_rgb8 is 17 bytes, but a row of 6 RGB pixels has 18 bytes");
    expect_error([&] { engine.copy_in_rgb8(memory.get(), size, pitch, stream.get(), 4); },
                 "copy_in_rgb8 was called with the batch index 4, but the engine's largest batch size is 4");
    expect_error([&] { engine.copy_in_rgb8(memory.get(), {0, 6}, pitch, stream.get()); },
                 "the image for copy_in_rgb8 has the height 0 and the width 6");
    setenv("STAND_IN_DEVICES", "2", 1);
    neck::check(cudaSetDevice(1), "test");
    const neck::DeviceMemory other = neck::allocate(pitch * 11, "test");
    neck::check(cudaSetDevice(0), "test");
    expect_error([&] { engine.copy_in_rgb8(other.get(), size, pitch, stream.get()); },
                 "the memory for the image is on GPU 1; pass memory of GPU 0 instead");
    unsetenv("STAND_IN_DEVICES");
}

void test_refusals(const std::string& plan) {
    neck::EngineOptions options;
    options.max_batch = 2;
    neck::Engine engine(plan, options);
    const OwnedStream stream = neck::make_stream("test");
    expect_error([&] { engine.infer(image_of(3, 1), stream.get()); },
                 "image is float32 (3, 3, 2, 2), but it must be image: float32 (1 to 2, 3, 2, 2)");
    expect_error([&] { engine.enqueue(0, stream.get()); }, "image is float32 (0, 3, 2, 2), but it must be image");
    expect_error([&] { engine.enqueue(-1, stream.get()); }, "but it must be image");
    neck::Tensor image = image_of(1, 1);
    image.shape = {1, 3, 4, 1};
    expect_error([&] { engine.infer(image, stream.get()); }, "image is float32 (1, 3, 4, 1), but");
    image.shape = {};
    expect_error([&] { engine.infer(image, stream.get()); }, "image is float32 (), but");
    image = image_of(1, 1);
    image.type = neck::DataType::int32;
    expect_error([&] { engine.infer(image, stream.get()); }, "image is int32 (1, 3, 2, 2), but");
    image = image_of(1, 1);
    image.data.pop_back();
    expect_error([&] { engine.infer(image, stream.get()); }, "but it must be image");
    expect(doubled(engine.infer(image_of(2, 1), stream.get()), 2, 1), "it goes on after a refusal");
    options.max_batch = 5;
    expect_error([&] { neck::Engine(plan, options); },
                 "max_batch is 5, but the plan's smallest batch size is 1 and the plan's largest batch size is 4");
    options = {};
    options.device = 3;
    expect_error([&] { neck::Engine(plan, options); }, "there is no GPU 3; the number of GPUs in this machine is 1");
}

/// Lets every call of a function fail, one after the other, until none is left.
void test_failures(const std::string& plan, const std::string& function, bool graph) {
    const int before = fake::alive();
    int seen = 0;
    for (int call = 1;; ++call) {
        unsetenv("STAND_IN_FAIL");
        fake::start_over();
        setenv("STAND_IN_FAIL", (function + ":" + std::to_string(call)).c_str(), 1);
        std::string told;
        try {
            neck::EngineOptions options;
            options.cuda_graph = graph;
            neck::Engine engine(plan, options);
            const OwnedStream stream = neck::make_stream("test");
            const bool right = doubled(engine.infer(image_of(2, 6), stream.get()), 2, 6);
            expect(right || fake::has_failed(), function + ": wrong outputs without a failure");
        } catch (const neck::Error& error) {
            told = error.what();
        }
        unsetenv("STAND_IN_FAIL");
        expect(fake::alive() == before,
               function + ": something is left on the GPU after call " + std::to_string(call));
        if (!fake::has_failed()) {
            break;
        }
        ++seen;
        const bool quiet = told.empty() && (function == "cudaEventSynchronize" || function == "cudaSetDevice" ||
                                            function == "cudaGetDevice");  // in a destructor, which goes on
        expect(quiet || told.find("; ") != std::string::npos || told.find("test") == 0,
               function + ": no error with a remedy: '" + told + "'");
        expect(told.find('\n') == std::string::npos, function + ": more than one line");
        if (function == "cudaMalloc") {
            expect(
                told.find("out of device memory; 20.0 of 24.0 GB of device memory are free; if that is too little, close "
                          "other programs or use a smaller batch") != std::string::npos,
                told);
        }
        if (graph && function == "cudaStreamBeginCapture") {
            expect(told.find("the CUDA graph cannot be captured (operation not permitted when stream is capturing); "
                             "run the plan without a CUDA graph") != std::string::npos,
                   told);
        }
    }
    std::cout << function << (graph ? " (graph)" : "") << ": " << seen << " calls failed\n";
    expect(seen > 0, function + " is never called");
}

/// TensorRT warns that the second engine's logger is another; every engine has its own.
void test_two_engines(const std::string& plan) {
    const neck::Engine first(plan);
    const neck::Engine second(plan);
    expect(first.warnings().empty() && second.warnings().empty(), "no warning of the logger");
    struct Counting : nvinfer1::ILogger {
        void log(Severity severity, nvinfer1::AsciiChar const* /*message*/) noexcept override {
            warnings += severity == Severity::kWARNING ? 1 : 0;
        }
        int warnings = 0;
    } logger;
    delete nvinfer1::createInferRuntime(logger);
    expect(logger.warnings == 1, "the control: TensorRT does warn");
}

}  // namespace

void test_engine(const std::string& plan) {
    for (const bool graph : {false, true}) {
        test_batches(plan, graph);
        test_callers_memory(plan, graph);
        test_bound_outputs(plan, graph);
        for (const char* function :
             {"createInferRuntime", "deserializeCudaEngine", "createExecutionContext", "setInputShape",
              "setTensorAddress", "enqueueV3", "cudaMalloc", "cudaMemGetInfo", "cudaMemcpyAsync", "cudaGetDevice",
              "cudaSetDevice", "cudaGetDeviceProperties", "cudaDeviceGetAttribute", "cudaStreamCreateWithFlags",
              "cudaStreamSynchronize", "cudaStreamWaitEvent", "cudaEventCreateWithFlags", "cudaEventRecord",
              "cudaEventSynchronize"}) {
            test_failures(plan, function, graph);
        }
    }
    for (const char* function :
         {"cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags", "cudaGraphLaunch"}) {
        test_failures(plan, function, true);
    }
    test_dlpack(plan);
    test_two_engines(plan);
    test_resizes(resize_here);
    test_kernels_of_the_processor();
    test_images_on_the_gpu(plan);
    test_refusals(plan);
    expect(fake::alive() == 0, "nothing is left on the GPU");
}
