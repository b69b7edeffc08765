// neck::Engine against the stand-ins: order on streams, graphs, batches, every call that can fail. tests/test_cpp.py
// writes the plan (float32 (1 to 4, 3, 2, 2) in; float16 and float32 of 5 channels out) and runs this.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "cuda.hpp"
#include "device_resize.hpp"
#include "expect.hpp"
#include "neck/engine.hpp"
#include "stand_in.hpp"

namespace {

using neck::OwnedStream;

void test_batches(const std::string& plan, bool graph) {
    neck::EngineOptions options;
    options.cuda_graph = graph;
    neck::Engine engine(plan, options);
    const OwnedStream one = neck::make_stream("test");
    const OwnedStream two = neck::make_stream("test");
    expect_error([&] { engine.device_outputs(); }, "no outputs before its first run");
    float value = 1;
    for (const std::int64_t batch : {1, 4, 2, 1, 4, 3}) {  // back and forth: graphs are captured and used again
        value += 1;
        expect(doubled(engine.infer(image_of(batch, value), one.get()), batch, value), "the outputs of a batch");
        expect(!doubled(engine.infer(image_of(batch, value), one.get()), batch, value + 1), "the control");
    }
    // copied in on one stream, run on another, read on the first: only the engine's own waits keep the order
    engine.copy_in(image_of(2, 17), one.get());
    engine.enqueue(2, two.get());
    expect(doubled(engine.copy_out(one.get()), 2, 17), "order over two streams");
    engine.copy_in(image_of(2, 27), one.get());
    engine.enqueue(2, two.get());
    expect(doubled(engine.copy_out(two.get()), 2, 27), "an input from another stream");
    engine.copy_in(image_of(2, 18), two.get());
    engine.enqueue(2, one.get());
    engine.copy_in(image_of(2, 19), two.get());  // must not reach the run before
    expect(doubled(engine.copy_out(two.get()), 2, 18), "an input that is overwritten after its run");
    engine.enqueue(2, nullptr);  // the null stream
    expect(doubled(engine.copy_out(nullptr), 2, 19), "the null stream");
    engine.copy_in(image_of(1, 3), one.get());
    engine.enqueue(1, one.get());  // left running: the engine waits before it frees its memory
}

void test_callers_memory(const std::string& plan, bool graph) {
    neck::EngineOptions options;
    options.cuda_graph = graph;
    neck::Engine first(plan, options);
    const OwnedStream stream = neck::make_stream("test");
    const neck::Tensor image = image_of(3, 5);
    const neck::DeviceMemory memory = neck::allocate(image.data.size(), "test");
    neck::check(
        cudaMemcpyAsync(memory.get(), image.data.data(), image.data.size(), cudaMemcpyHostToDevice, stream.get()),
        "test");
    neck::Engine engine = std::move(first);
    engine.enqueue(3, stream.get(), memory.get());
    const std::vector<neck::DeviceTensor> outputs = engine.device_outputs();
    expect(outputs.size() == 2 && outputs[0].bytes == 3 * 5 * 4 * 2 && outputs[1].bytes == 3 * 5 * 4 * 4, "the sizes");
    std::vector<float> found(outputs[1].bytes / sizeof(float));
    neck::check(cudaMemcpyAsync(found.data(), outputs[1].data, outputs[1].bytes, cudaMemcpyDeviceToHost, stream.get()),
                "test");
    expect(found.front() == 10.25F && found.back() == 10.25F, "outputs read where they are");
    // the last two pictures, where they lie: not at a multiple of 256 bytes, which TensorRT refuses
    const neck::Tensor other = image_of(2, 6);
    std::byte* const odd = memory.get() + other.data.size() / 2;
    neck::check(cudaMemcpyAsync(odd, other.data.data(), other.data.size(), cudaMemcpyHostToDevice, stream.get()),
                "test");
    engine.enqueue(2, stream.get(), odd);
    expect(doubled(engine.copy_out(stream.get()), 2, 6), "an input at an address that is not aligned");
    engine = neck::Engine(plan, options);  // the old one goes
    expect(doubled(engine.infer(image, stream.get()), 3, 5), "an engine put in the place of another");
}

neck::Tensor colours_of(neck::Size size) {
    neck::Tensor pixels{"pixels", neck::DataType::uint8, {1, size.height, size.width, 3}, {}};
    unsigned value = 1;
    for (std::int64_t index = 0; index < size.height * size.width * 3; ++index) {
        value = value * 1664525U + 1013904223U;
        pixels.data.push_back(static_cast<std::byte>(value >> 24U));
    }
    return pixels;
}

/// The kernel's body gives what neck::Preprocessor gives.
void test_kernel() {
    for (const auto& [from, to] : std::vector<std::pair<neck::Size, neck::Size>>{
             {{7, 5}, {7, 5}}, {{1, 1}, {4, 3}}, {{3, 90}, {16, 16}}, {{61, 47}, {14, 28}}, {{5, 9}, {33, 8}}}) {
        const neck::Tensor pixels = colours_of(from);
        for (const neck::DataType type : {neck::DataType::float32, neck::DataType::uint8}) {
            const bool normalised = type == neck::DataType::float32;
            const neck::Shape shape =
                normalised ? neck::Shape{1, 3, to.height, to.width} : neck::Shape{1, to.height, to.width, 3};
            const neck::Tensor wanted = neck::Preprocessor({"image", type, shape}, 2).prepare(pixels).image;
            neck::Tensor found = wanted;
            std::fill(found.data.begin(), found.data.end(), std::byte{255});
            const neck::DeviceResize job{reinterpret_cast<const std::uint8_t*>(pixels.data.data()),
                                         from.height,
                                         from.width,
                                         static_cast<std::size_t>(from.width) * 3,
                                         found.data.data(),
                                         to.height,
                                         to.width,
                                         normalised};
            for (std::int64_t place = 0; place < to.height * to.width; ++place) {
                neck::resize_pixel(job, place / to.width, place % to.width);
            }
            const std::vector<float> left = wanted.to_floats();
            const std::vector<float> right = found.to_floats();
            bool near = true;
            for (std::size_t index = 0; index < left.size(); ++index) {
                near = near && std::abs(left[index] - right[index]) < (normalised ? 2.01F / 255 : 1.01F);
            }
            expect(near, "the kernel within one level of the processor");
        }
    }
}

void test_pictures_on_the_gpu(const std::string& plan) {
    neck::Engine engine(plan);
    const OwnedStream stream = neck::make_stream("test");
    const neck::Size size{11, 6};
    const neck::Tensor pixels = colours_of(size);
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
    expect(near, "a picture on the GPU is the second of a batch");
    expect_error([&] { engine.copy_in_rgb8(pixels.data.data(), size, pitch, stream.get()); },
                 "the picture is in host memory; expected memory of GPU 0, copy it there first");
    expect_error([&] { engine.copy_in_rgb8(memory.get(), size, 17, stream.get()); }, "rows of 3 bytes a pixel or more");
    expect_error([&] { engine.copy_in_rgb8(memory.get(), size, pitch, stream.get(), 4); }, "an entry below 4");
    expect_error([&] { engine.copy_in_rgb8(memory.get(), {0, 6}, pitch, stream.get()); }, "sides above 0");
    setenv("STAND_IN_DEVICES", "2", 1);
    neck::check(cudaSetDevice(1), "test");
    const neck::DeviceMemory other = neck::allocate(pitch * 11, "test");
    neck::check(cudaSetDevice(0), "test");
    expect_error([&] { engine.copy_in_rgb8(other.get(), size, pitch, stream.get()); },
                 "the picture is in the memory of GPU 1; expected memory of GPU 0, copy it there first");
    unsetenv("STAND_IN_DEVICES");
}

std::vector<float> floats_at(const void* memory, std::size_t count, cudaStream_t stream) {
    std::vector<float> floats(count);
    neck::check(cudaMemcpyAsync(floats.data(), memory, count * sizeof(float), cudaMemcpyDeviceToHost, stream), "test");
    neck::check(cudaStreamSynchronize(stream), "test");
    return floats;
}

void test_bound_outputs(const std::string& plan, bool graph) {
    neck::EngineOptions options;
    options.cuda_graph = graph;
    neck::Engine engine(plan, options);
    const OwnedStream stream = neck::make_stream("test");
    const OwnedStream other = neck::make_stream("test");
    constexpr std::size_t bytes = 4 * 20 * sizeof(float);
    const neck::DeviceMemory mine = neck::allocate(bytes + 256, "test");
    expect(doubled(engine.infer(image_of(2, 1), stream.get()), 2, 1), "the engine's own memory");
    engine.bind_output("full", mine.get(), bytes);
    expect_error([&] { engine.device_outputs(); }, "no outputs before its first run");
    engine.copy_in(image_of(2, 4), stream.get());
    engine.enqueue(2, stream.get());
    // another stream waits for the event, not for the host
    neck::check(cudaStreamWaitEvent(other.get(), engine.finished(), 0), "test");
    expect(floats_at(mine.get(), 40, other.get()).back() == 8.25F, "an output in the caller's memory");
    expect(engine.device_outputs()[1].data == mine.get(), "and where it is told to be");
    expect(doubled(engine.copy_out(stream.get()), 2, 4), "copied out of there");
    expect_error([&] { engine.bind_output("full", mine.get(), bytes - 1); },
                 "the memory for full has 319 bytes; expected 320, enough for a batch of 4");
    expect_error([&] { engine.bind_output("full", mine.get() + 4, bytes); },
                 "at an address that is no multiple of 256 bytes; give what cudaMalloc gave");
    alignas(256) static std::byte host[bytes];
    expect_error([&] { engine.bind_output("full", host, bytes); }, "is in host memory; expected memory of GPU 0");
    expect_error([&] { engine.bind_output("none", mine.get(), bytes); }, "has no output 'none'; it has half, full");
    expect(doubled(engine.infer(image_of(1, 5), stream.get()), 1, 5), "refused memory changes nothing");
    engine.bind_output("full", nullptr, 0);
    expect(doubled(engine.infer(image_of(3, 6), stream.get()), 3, 6), "the engine's own memory again");
    expect(floats_at(mine.get(), 20, stream.get()).back() == 10.25F, "the caller's is left alone");
}

void test_dlpack(const std::string& plan) {
    const OwnedStream stream = neck::make_stream("test");
    neck::dlpack::Managed* half = nullptr;
    neck::dlpack::Managed* full = nullptr;
    {
        neck::Engine engine(plan);
        expect_error([&] { engine.to_dlpack("full"); }, "no outputs before its first run");
        engine.infer(image_of(2, 7), stream.get());
        half = engine.to_dlpack("half");
        full = engine.to_dlpack("full");
        expect(full->dl_tensor.data == engine.device_outputs()[1].data, "without a copy");
    }  // the memory outlives the engine
    const neck::dlpack::Tensor& tensor = full->dl_tensor;
    expect(tensor.ndim == 4 && tensor.shape[0] == 2 && tensor.shape[1] == 5 && tensor.strides == nullptr, "the shape");
    expect(tensor.device.type == 2 && tensor.device.id == 0 && tensor.byte_offset == 0, "the device");
    expect(tensor.dtype.code == 2 && tensor.dtype.bits == 32 && tensor.dtype.lanes == 1, "float32");
    expect(half->dl_tensor.dtype.code == 2 && half->dl_tensor.dtype.bits == 16, "float16");
    expect(floats_at(tensor.data, 40, stream.get()).front() == 14.25F, "the values, when the engine is gone");
    half->deleter(half);
    full->deleter(full);
}

void test_refusals(const std::string& plan) {
    neck::EngineOptions options;
    options.max_batch = 2;
    neck::Engine engine(plan, options);
    const OwnedStream stream = neck::make_stream("test");
    expect_error([&] { engine.infer(image_of(3, 1), stream.get()); },
                 "image is float32 (3, 3, 2, 2); expected image: float32 (1 to 2, 3, 2, 2)");
    expect_error([&] { engine.enqueue(0, stream.get()); }, "image is float32 (0, 3, 2, 2); expected image");
    expect_error([&] { engine.enqueue(-1, stream.get()); }, "expected image");
    neck::Tensor image = image_of(1, 1);
    image.shape = {1, 3, 4, 1};
    expect_error([&] { engine.infer(image, stream.get()); }, "image is float32 (1, 3, 4, 1); expected");
    image.shape = {};
    expect_error([&] { engine.infer(image, stream.get()); }, "image is float32 (); expected");
    image = image_of(1, 1);
    image.type = neck::DataType::int32;
    expect_error([&] { engine.infer(image, stream.get()); }, "image is int32 (1, 3, 2, 2); expected");
    image = image_of(1, 1);
    image.data.pop_back();
    expect_error([&] { engine.infer(image, stream.get()); }, "expected image");
    expect(doubled(engine.infer(image_of(2, 1), stream.get()), 2, 1), "it goes on after a refusal");
    options.max_batch = 5;
    expect_error([&] { neck::Engine(plan, options); },
                 "a largest batch of 5 was asked; expected image: float32 (1 to 4");
    options = {};
    options.device = 3;
    expect_error([&] { neck::Engine(plan, options); }, "there is no GPU 3; here are 1");
}

/// Lets every call of a function fail, one after the other, until none is left.
void test_failures(const std::string& plan, const std::string& function, bool graph) {
    const int before = stand_in::alive();
    int seen = 0;
    for (int call = 1;; ++call) {
        unsetenv("STAND_IN_FAIL");
        stand_in::start_over();
        setenv("STAND_IN_FAIL", (function + ":" + std::to_string(call)).c_str(), 1);
        std::string told;
        try {
            neck::EngineOptions options;
            options.cuda_graph = graph;
            neck::Engine engine(plan, options);
            const OwnedStream stream = neck::make_stream("test");
            const bool right = doubled(engine.infer(image_of(2, 6), stream.get()), 2, 6);
            expect(right || stand_in::has_failed(), function + ": wrong outputs without a failure");
        } catch (const neck::Error& error) {
            told = error.what();
        }
        unsetenv("STAND_IN_FAIL");
        expect(stand_in::alive() == before,
               function + ": something is left on the GPU after call " + std::to_string(call));
        if (!stand_in::has_failed()) {
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
                told.find("out of device memory; 20.0 of 24.0 GB of device memory are free; if too little, end other "
                          "programs or take a smaller batch") != std::string::npos,
                told);
        }
        if (graph && function == "cudaStreamBeginCapture") {
            expect(told.find("no CUDA graph can be captured (operation not permitted when stream is capturing); run it "
                             "without one") != std::string::npos,
                   told);
        }
    }
    std::cout << function << (graph ? " (graph)" : "") << ": " << seen << " calls failed\n";
    expect(seen > 0, function + " is never called");
}

}  // namespace

int main(int count, char** values) {
    if (count != 2) {
        return 2;
    }
    const std::string plan = values[1];
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
    test_kernel();
    test_pictures_on_the_gpu(plan);
    test_refusals(plan);
    expect(stand_in::alive() == 0, "nothing is left on the GPU");
    return failures == 0 ? 0 : 1;
}
