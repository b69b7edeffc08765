// What goes wrong on a busy machine: a file that is cut while it is read, memory or threads that cannot be had.
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <new>
#include <string>

#include "faults.hpp"
#include "neck/error.hpp"
#include "neck/preprocess.hpp"

namespace {

std::atomic<long> until_failure{0};  // 0: no allocation fails
std::size_t smallest = 0;             // bytes of those that are counted

void* take(std::size_t size, std::size_t alignment) {
    constexpr std::size_t most = std::size_t{1} << 38U;  // the address sanitizer ends the program above 2^40
    if ((size >= smallest && until_failure > 0 && --until_failure == 0) || size > most) {
        throw std::bad_alloc();
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment < sizeof(void*) ? sizeof(void*) : alignment, size == 0 ? 1 : size) != 0) {
        throw std::bad_alloc();
    }
    return memory;
}

}  // namespace

void* operator new(std::size_t size) { return take(size, alignof(std::max_align_t)); }
void* operator new[](std::size_t size) { return take(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) { return take(size, static_cast<std::size_t>(alignment)); }
void* operator new[](std::size_t size, std::align_val_t alignment) {
    return take(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t /*size*/) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t /*size*/) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t /*alignment*/) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t /*alignment*/) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t /*size*/, std::align_val_t /*alignment*/) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t /*size*/, std::align_val_t /*alignment*/) noexcept {
    std::free(memory);
}

/// Stands before the C library's: with CUT_AFTER_OPENING, a file of more than a page is cut as soon as its size is known,
/// as by a writer that comes between.
extern "C" int fstat(int number, struct stat* about) noexcept {
    const int code = static_cast<int>(syscall(SYS_fstat, number, about));
    if (code == 0 && std::getenv("CUT_AFTER_OPENING") != nullptr && S_ISREG(about->st_mode) && about->st_size > 8192) {
        const std::string path = "/proc/self/fd/" + std::to_string(number);
        if (truncate(path.c_str(), about->st_size / 3) != 0) {
            std::perror("cut");
        }
    }
    return code;
}

void fail_every_allocation(std::size_t least, const std::function<void()>& work) {
    smallest = least;
    long failed = 0;
    long told = 0;
    for (long number = 1;; ++number) {
        until_failure = number;
        try {
            work();
        } catch (const neck::MemoryError&) {
            ++told;
        } catch (const neck::Error& error) {
            std::cout << "another error: " << error.what() << "\n";
        }
        if (until_failure > 0) {
            break;  // it needed no more
        }
        ++failed;
    }
    until_failure = 0;
    std::cout << failed << " allocations failed, " << told << " told\n";
}

void refuse_threads() {
    const rlimit none{0, 0};
    if (setrlimit(RLIMIT_NPROC, &none) != 0 || (geteuid() == 0 && setuid(65534) != 0)) {
        std::perror("no limit");
    }
    const neck::Preprocessor preprocessor({"image", neck::DataType::uint8, {-1, 40, 40, 3}}, 4);
    try {
        preprocessor.prepare({"pixels", neck::DataType::uint8, {1, 90, 90, 3}});
        std::cout << "done\n";
    } catch (const neck::Error& error) {
        std::cout << "error: " << error.what() << "\n";
    }
}
