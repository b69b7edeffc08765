#include "runs.hpp"

#include <algorithm>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "gpu/cuda.hpp"
#include "expect.hpp"
#include "neck/engine.hpp"
#include "neck/pool.hpp"

using neck::OwnedStream;

void test_batches(const std::string& plan, bool graph) {
    neck::EngineOptions options;
    options.cuda_graph = graph;
    neck::Engine engine(plan, options);
    const OwnedStream one = neck::make_stream("test");
    const OwnedStream two = neck::make_stream("test");
    expect_error([&] { engine.device_outputs(); }, "no outputs before the first run");
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
    // the last two images, where they lie: not at a multiple of 256 bytes, which TensorRT refuses
    const neck::Tensor other = image_of(2, 6);
    std::byte* const odd = memory.get() + other.data.size() / 2;
    neck::check(cudaMemcpyAsync(odd, other.data.data(), other.data.size(), cudaMemcpyHostToDevice, stream.get()),
                "test");
    engine.enqueue(2, stream.get(), odd);
    expect(doubled(engine.copy_out(stream.get()), 2, 6), "an input at an address that is not aligned");
    engine = neck::Engine(plan, options);  // the old one goes
    expect(doubled(engine.infer(image, stream.get()), 3, 5), "an engine put in the place of another");
}

static std::vector<float> floats_at(const void* memory, std::size_t count, cudaStream_t stream) {
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
    expect_error([&] { engine.device_outputs(); }, "no outputs before the first run");
    engine.copy_in(image_of(2, 4), stream.get());
    engine.enqueue(2, stream.get());
    // another stream waits for the event, not for the host
    neck::check(cudaStreamWaitEvent(other.get(), engine.finished(), 0), "test");
    expect(floats_at(mine.get(), 40, other.get()).back() == 8.25F, "an output in the caller's memory");
    expect(engine.device_outputs()[1].data == mine.get(), "and where it is told to be");
    expect(doubled(engine.copy_out(stream.get()), 2, 4), "copied out of there");
    expect_error([&] { engine.bind_output("full", mine.get(), bytes - 1); },
                 "for the output full has only 319 bytes, but the largest batch size 4 needs 320 bytes");
    expect_error([&] { engine.bind_output("full", mine.get() + 4, bytes); },
                 "the memory for output full is not aligned to 256 bytes");
    alignas(256) static std::byte host[bytes];
    expect_error([&] { engine.bind_output("full", host, bytes); },
                 "the memory for output full is on the host; pass memory of GPU 0");
    expect_error([&] { engine.bind_output("none", mine.get(), bytes); },
                 "the plan has no output 'none'; choose one of half, full");
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
        expect_error([&] { engine.to_dlpack("full"); }, "no outputs before the first run");
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

void test_many_threads(const std::string& plan, int contexts, int threads, int requests, std::chrono::seconds least) {
    neck::PoolOptions options;
    options.contexts = contexts;
    neck::Pool pool(plan, options);
    const auto end = std::chrono::steady_clock::now() + least;
    std::atomic<long> answered{0};
    std::atomic<long> asked{0};
    std::atomic<long> fewest{1'000'000'000};
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; ++thread) {
        running.emplace_back([&, thread] {
            long mine = 0;
            while (mine < requests || std::chrono::steady_clock::now() < end) {
                const float value = static_cast<float>(1 + (thread * 31 + mine) % 500);
                const std::int64_t batch = 1 + mine % 4;
                ++asked;
                try {
                    const neck::Pool::Lease lease = pool.acquire(std::chrono::minutes(10));
                    const auto outputs = lease->infer(image_of(batch, value), lease.stream());
                    expect(doubled(outputs, batch, value), "an answer to one's own request");
                    ++answered;
                    if (mine % 3 == 2) {
                        throw std::runtime_error("the caller's own");
                    }
                } catch (const std::runtime_error& error) {
                    expect(std::string(error.what()) == "the caller's own", error.what());
                }
                ++mine;
            }
            for (long seen = fewest; mine < seen && !fewest.compare_exchange_weak(seen, mine);) {
            }
        });
    }
    for (std::thread& thread : running) {
        thread.join();
    }
    expect(answered == asked, "no request is lost");
    std::cout << answered << " requests of " << threads << " threads answered, " << fewest << " or more of each\n";
}
