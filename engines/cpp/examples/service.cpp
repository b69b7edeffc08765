// A service in miniature: service PLAN IMAGE... answers every image from four threads.
//
// What it shows: images of any size; a pool of contexts over one set of weights; an output in memory of one's own
// that another stream reads without a copy and without the host; a start that finds TensorRT-RTX's kernels
// (PLAN.cache).
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <future>
#include <iostream>
#include <mutex>
#include <string>
#include <vector>

#include <neck/pool.hpp>
#include <neck/preprocess.hpp>

namespace {

using namespace std::chrono_literals;

void check(cudaError_t code) {
    if (code != cudaSuccess) {
        throw neck::Error(cudaGetErrorString(code));
    }
}

/// Memory on the GPU that the answers are written to.
struct Memory {
    void* address = nullptr;
    explicit Memory(std::size_t bytes) { check(cudaMalloc(&address, bytes)); }
    ~Memory() { cudaFree(address); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
};

/// Answers images until none is left; each thread has memory and a stream of its own for what it does with the
/// answers.
void answer(neck::Pool& pool, const std::vector<std::string>& images, std::atomic<std::size_t>& next) {
    static std::mutex printing;
    const neck::Port input = pool.acquire(10s)->input();
    const neck::Port output = pool.acquire(10s)->outputs().front();
    const neck::Preprocessor preprocessor(input);
    const std::size_t bytes = neck::bytes_of(output.type, output.at(input.largest_batch));
    const Memory features(bytes);
    cudaStream_t consumer = nullptr;
    check(cudaStreamCreateWithFlags(&consumer, cudaStreamNonBlocking));
    for (std::size_t index = next++; index < images.size(); index = next++) {
        try {
            const neck::Batch batch = preprocessor.read({images[index]});
            const neck::Pool::Lease lease = pool.acquire(10s);  // gives the context back whatever happens below
            lease->bind_output(output.name, features.address, bytes);
            lease->copy_in(batch.image, lease.stream());
            lease->enqueue(1, lease.stream());
            // from here on `consumer` may read features.address: a decoder's kernel would be queued in the place of
            // this
            check(cudaStreamWaitEvent(consumer, lease->finished(), 0));
            std::vector<std::byte> first(neck::size_of(output.type));
            check(cudaMemcpyAsync(first.data(), features.address, first.size(), cudaMemcpyDeviceToHost, consumer));
            check(cudaStreamSynchronize(consumer));
            const neck::Fit& fit = batch.fits.front();
            const std::lock_guard<std::mutex> lock(printing);
            std::cout << images[index] << ": the output " << output.name << " was computed from the resized image. "
                      << "To convert coordinates from the resized image to the original image, multiply x by "
                      << fit.scale_x << " and y by " << fit.scale_y << "\n";
        } catch (const neck::Error& error) {  // an image that cannot be used does not end the service
            const std::lock_guard<std::mutex> lock(printing);
            std::cerr << error.what() << "\n";
        }
    }
    check(cudaStreamDestroy(consumer));
}

}  // namespace

int main(int count, char** values) {
    const std::vector<std::string> images(values + std::min(count, 2), values + count);
    try {
        neck::PoolOptions options;
        options.contexts = 2;
        neck::Pool pool(count > 1 ? values[1] : "", options);
        std::cout << pool.contexts() << " contexts use " << pool.context_bytes()
                  << " bytes of device memory each, in addition to the weights\n";
        std::atomic<std::size_t> next{0};
        std::vector<std::future<void>> threads;
        for (int index = 0; index < 4; ++index) {
            threads.push_back(std::async(std::launch::async, [&] { answer(pool, images, next); }));
        }
        for (std::future<void>& thread : threads) {
            thread.get();
        }
    } catch (const std::exception& error) {  // neck::Error, or what this program itself could not get
        std::cerr << error.what() << "\n";
        return 1;
    }
    return 0;
}
