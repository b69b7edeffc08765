#include <csignal>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "state.hpp"

namespace {

std::string setting(const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return value != nullptr ? value : otherwise;
}

int device_count() { return std::atoi(setting("STAND_IN_DEVICES", "1").c_str()); }

}  // namespace

namespace fake {

namespace {
std::recursive_mutex& mutex() {
    static std::recursive_mutex only;
    return only;
}
}  // namespace

Lock::Lock() { mutex().lock(); }
Lock::~Lock() { mutex().unlock(); }

State& state() {
    static State only;
    return only;
}

cudaStream_t real(cudaStream_t stream) { return stream != nullptr ? stream : &state().null_stream; }

/// The code of a call, kept as cudaGetLastError's.
cudaError_t give(cudaError_t code) {
    if (code != cudaSuccess) {
        fake::last_error = code;
    }
    return code;
}

cudaError_t try_call(const char* function, cudaError_t code) { return give(fails(function) ? code : cudaSuccess); }

bool fails(const char* function) {
    const Lock lock;
    const std::string asked = setting("STAND_IN_FAIL", "");
    const std::size_t colon = asked.find(':');
    const int call = ++state().calls[function];
    if (setting("STAND_IN_KILL", "") == function + (":" + std::to_string(call))) {
        std::raise(SIGKILL);
    }
    const bool now = asked.substr(0, colon) == function &&
                     (colon == std::string::npos || std::atoi(asked.c_str() + colon + 1) == call);
    state().failed = state().failed || now;
    return now;
}

void start_over() {
    const Lock lock;
    state().calls.clear();
    state().failed = false;
}

bool has_failed() {
    const Lock lock;
    return state().failed;
}

int alive() {
    const Lock lock;
    return state().alive;
}

void count(int change) {
    const Lock lock;
    state().alive += change;
}

void queue(cudaStream_t stream, std::function<void()> work) {
    const Lock lock;
    stream = real(stream);
    if (stream->capture != nullptr) {
        stream->capture->work.push_back(std::move(work));
        return;
    }
    stream->waiting.push_back(std::move(work));
    ++stream->queued;
}

bool capturing(cudaStream_t stream) {
    const Lock lock;
    return real(stream)->capture != nullptr;
}

Reach::Reach(const Program& program) : program_(program) {}
Reach::~Reach() = default;

std::map<std::string, Bound> Reach::bring(const std::map<std::string, Bound>& bound, cudaStream_t /*stream*/) {
    return bound;
}

void Reach::take_back(const std::map<std::string, Bound>& /*bound*/, cudaStream_t /*stream*/) {}

void spoil(void* memory, std::size_t size, cudaStream_t stream) {
    queue(stream, [=] { std::memset(memory, 7, size); });
}

}  // namespace fake

using fake::give;
using fake::state;
using fake::try_call;

cudaError_t cudaGetDeviceCount(int* count) {
    const fake::Lock lock;
    *count = device_count();
    return give(*count > 0 ? cudaSuccess : cudaErrorInsufficientDriver);
}

cudaError_t cudaDriverGetVersion(int* version) {
    const fake::Lock lock;
    *version = std::atoi(setting("STAND_IN_DRIVER", "13000").c_str());
    return try_call("cudaDriverGetVersion");
}

cudaError_t cudaGetDevice(int* device) {
    const fake::Lock lock;
    *device = fake::current_device;
    return try_call("cudaGetDevice");
}

cudaError_t cudaSetDevice(int device) {
    const fake::Lock lock;
    if (device < 0 || device >= device_count()) {
        return give(cudaErrorInvalidDevice);
    }
    fake::current_device = device;
    return try_call("cudaSetDevice");
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int /*device*/) {
    const fake::Lock lock;
    std::strcpy(properties->name, "NVIDIA L4");
    return try_call("cudaGetDeviceProperties");
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
    const fake::Lock lock;
    const std::string capability = setting("STAND_IN_CAPABILITY", "8.9");
    const bool major = attribute == cudaDevAttrComputeCapabilityMajor;
    *value = std::atoi(capability.c_str() + (major ? 0 : capability.find('.') + 1));
    return try_call("cudaDeviceGetAttribute");
}

cudaError_t cudaGetLastError() { return std::exchange(fake::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t code) {
    switch (code) {
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorInsufficientDriver:
            return "CUDA driver version is insufficient for CUDA runtime version";
        case cudaErrorStreamCaptureUnsupported:
            return "operation not permitted when stream is capturing";
        default:
            return "unspecified launch failure";
    }
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
    const fake::Lock lock;
    *free = std::strtoull(setting("STAND_IN_FREE", "20000000000").c_str(), nullptr, 10);
    *total = std::size_t{24'000'000'000};
    return try_call("cudaMemGetInfo");
}

cudaError_t cudaMalloc(void** address, std::size_t size) {
    const fake::Lock lock;
    if (try_call("cudaMalloc", cudaErrorMemoryAllocation) != cudaSuccess) {
        return cudaErrorMemoryAllocation;
    }
    *address = nullptr;
    if (posix_memalign(address, 256, size) != 0) {
        return give(cudaErrorMemoryAllocation);
    }
    std::memset(*address, 0xff, size);  // not a number, until written
    state().memory[static_cast<const char*>(*address)] = {size, fake::current_device};
    fake::count(1);
    return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
    const fake::Lock lock;
    if (address != nullptr) {
        for (cudaStream_t stream : state().streams) {
            stream->run_to(stream->queued);
        }
        state().null_stream.run_to(state().null_stream.queued);
        state().memory.erase(static_cast<const char*>(address));
        std::free(address);
        fake::count(-1);
    }
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
    const fake::Lock lock;
    const auto* byte = static_cast<const char*>(address);
    auto after = state().memory.upper_bound(byte);
    const bool inside =
        after != state().memory.begin() && byte < std::prev(after)->first + std::prev(after)->second.size;
    *attributes = {inside ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered,
                   inside ? std::prev(after)->second.device : -1, nullptr, nullptr};
    return try_call("cudaPointerGetAttributes");
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t count, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    const fake::Lock lock;
    if (try_call("cudaMemcpyAsync") != cudaSuccess) {
        return cudaErrorLaunchFailure;
    }
    if (kind == cudaMemcpyHostToDevice) {  // of pageable memory: read before the call returns
        const auto* begin = static_cast<const char*>(source);
        const std::vector<char> staged(begin, begin + count);
        fake::queue(stream, [=] { std::memcpy(target, staged.data(), staged.size()); });
        return cudaSuccess;
    }
    fake::queue(stream, [=] { std::memcpy(target, source, count); });
    return kind == cudaMemcpyDeviceToHost ? cudaStreamSynchronize(stream) : cudaSuccess;  // pageable: waits
}
