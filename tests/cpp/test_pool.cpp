// neck::Pool against the fakes, whose contexts abort where two threads use one.
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <thread>

#include "gpu/cuda.hpp"
#include "expect.hpp"
#include "neck/pool.hpp"
#include "runs.hpp"
#include "tests.hpp"
#include "fake.hpp"

namespace {

using namespace std::chrono_literals;

neck::PoolOptions options_of(int contexts, std::size_t most_waiting = 256) {
    neck::PoolOptions options;
    options.contexts = contexts;
    options.most_waiting = most_waiting;
    return options;
}

void wait_for(const neck::Pool& pool, std::size_t count) {
    while (pool.waiting() != count) {
        std::this_thread::yield();
    }
}

void test_first_come_first_served(const std::string& plan) {
    neck::Pool pool(plan, options_of(1));
    std::optional<neck::Pool::Lease> held = pool.acquire(0ms);
    std::vector<int> order;
    std::mutex mutex;
    std::vector<std::thread> threads;
    for (int index = 0; index < 8; ++index) {
        threads.emplace_back([&, index] {
            const neck::Pool::Lease lease = pool.acquire(10min);
            const std::lock_guard<std::mutex> lock(mutex);
            order.push_back(index);
        });
        wait_for(pool, static_cast<std::size_t>(index) + 1);
    }
    held.reset();
    for (std::thread& thread : threads) {
        thread.join();
    }
    expect(order == std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7}, "first come, first served");
}

void test_pool_refusals(const std::string& plan) {
    for (const int contexts : {0, -1, 1025}) {
        expect_error([&] { neck::Pool(plan, options_of(contexts)); },
                     "a pool cannot have " + std::to_string(contexts) + " contexts; set PoolOptions::contexts");
    }
    // scratch 1000, input 4 * 48, outputs 4 * 40 and 4 * 80 bytes
    setenv("STAND_IN_FREE", "4000", 1);
    expect_error([&] { neck::Pool(plan, options_of(5)); },
                 "5 contexts need another 0.0 MB of device memory, but only 0.0 MB are free; use at most 3 contexts");
    neck::Pool pool(plan, options_of(2, 1));
    unsetenv("STAND_IN_FREE");
    expect(pool.contexts() == 2 && pool.context_bytes() == 1000 + 192 + 160 + 320, "the memory of a context");
    const neck::Pool::Lease one = pool.acquire(1ms);
    neck::Pool::Lease two = pool.acquire(1ms);
    expect(&*one != &*two && one.stream() != two.stream(), "two contexts");
    expect_error([&] { pool.acquire(1ms); }, "none of the 2 contexts became free within 1 ms");
    std::thread waits([&] { pool.acquire(10min); });
    wait_for(pool, 1);
    expect_error([&] { pool.acquire(10min); }, "1 threads are already waiting for one of 2 contexts");
    { const neck::Pool::Lease moved = std::move(two); }
    waits.join();
    two = pool.acquire(1ms);  // into one that was moved from
}

/// What a lease bound goes with it: the next one's run does not write to memory that was freed meanwhile.
void test_bound_memory_goes_back(const std::string& plan) {
    neck::Pool pool(plan, options_of(1));
    try {
        const neck::DeviceMemory memory = neck::allocate(320, "test");
        const neck::Pool::Lease lease = pool.acquire(1ms);
        lease->bind_output("full", memory.get(), 320);
        lease->copy_in(image_of(2, 5), lease.stream());
        lease->enqueue(2, lease.stream());  // still running when the lease goes back
        throw std::runtime_error("the caller's own");
    } catch (const std::runtime_error&) {
    }
    const neck::Pool::Lease lease = pool.acquire(1ms);
    expect(doubled(lease->infer(image_of(3, 6), lease.stream()), 3, 6),
           "a context that was given back with memory bound");
}

/// A run that failed costs its own request alone: the next one has a context that was made anew.
void test_recovery(const std::string& plan) {
    for (const bool graph : {false, true}) {
        neck::EngineOptions options;
        options.cuda_graph = graph;
        neck::Pool pool(plan, options_of(1), options);
        const auto right = [&](float value) {
            const neck::Pool::Lease lease = pool.acquire(1ms);
            return doubled(lease->infer(image_of(2, value), lease.stream()), 2, value);
        };
        expect(right(3), "the control");
        const char* const functions[] = {"enqueueV3", "cudaGraphLaunch"};
        fake::start_over();
        setenv("STAND_IN_FAIL", (std::string(functions[graph ? 1 : 0]) + ":1").c_str(), 1);
        expect_error([&] { right(4); }, graph ? ": CUDA could not launch the plan's CUDA graph (" : "the run failed (");
        unsetenv("STAND_IN_FAIL");
        const int before = fake::alive();
        expect(right(5) && right(6), "requests after one that failed");
        expect(fake::alive() == before, "the old context and its memory are gone");
        // while it cannot be made anew each request is told so, and the pool waits for the GPU
        setenv("STAND_IN_FAIL", functions[graph ? 1 : 0], 1);
        expect_error([&] { right(4); }, graph ? "CUDA could not launch the plan's CUDA graph" : "the run failed");
        setenv("STAND_IN_FAIL", "cudaMalloc", 1);
        expect_error([&] { right(4); }, "out of device memory");
        expect_error([&] { right(4); }, "out of device memory");
        unsetenv("STAND_IN_FAIL");
        expect(right(7), "a GPU that is back");
    }
    neck::Engine engine(plan);
    setenv("STAND_IN_FAIL", "enqueueV3", 1);
    expect_error([&] { engine.infer(image_of(1, 1), nullptr); }, "the run failed");
    expect(engine.failed(), "it is noted");
    setenv("STAND_IN_FAIL", "cudaMalloc", 1);
    expect_error([&] { engine.recover(); }, "out of device memory");
    expect_error([&] { engine.infer(image_of(1, 1), nullptr); }, "the execution context was discarded");
    engine.unbind_outputs();
    unsetenv("STAND_IN_FAIL");
    engine.recover();
    expect(!engine.failed() && doubled(engine.infer(image_of(1, 8), nullptr), 1, 8), "an engine that recovered");
    neck::Tensor wrong = image_of(1, 1);
    wrong.shape = {2, 3, 2, 1};
    expect_error([&] { engine.infer(wrong, nullptr); }, "but it must be image");
    expect(!engine.failed(), "a wrong input is no failure of the GPU");
}

void test_closed(const std::string& plan) {
    std::optional<neck::Pool::Lease> out;
    {
        neck::Pool pool(plan, options_of(1));
        out = pool.acquire(1ms);
        std::thread waits([&] { expect_error([&] { pool.acquire(10min); }, "the pool of contexts is closed"); });
        wait_for(pool, 1);
        pool.close();
        waits.join();
        expect_error([&] { pool.acquire(1ms); }, "the pool of contexts is closed");
    }
    expect(doubled((*out)->infer(image_of(1, 3), out->stream()), 1, 3), "a lease outlives its pool");
    out.reset();
}

}  // namespace

void share_a_context(const std::string& plan) {
    neck::Pool pool(plan, options_of(1));
    const neck::Pool::Lease lease = pool.acquire(1ms);
    const auto end = std::chrono::steady_clock::now() + 5min;
    const auto run = [&] {
        while (std::chrono::steady_clock::now() < end) {
            lease->enqueue(1, lease.stream());
        }
    };
    std::thread other(run);
    run();
    other.join();
}

void test_pool(const std::string& plan, int threads, int requests, std::chrono::seconds least) {
    test_first_come_first_served(plan);
    test_pool_refusals(plan);
    test_bound_memory_goes_back(plan);
    test_recovery(plan);
    test_closed(plan);
    test_many_threads(plan, 4, threads, requests, least);
    expect(fake::alive() == 0, "nothing is left on the GPU");
}
