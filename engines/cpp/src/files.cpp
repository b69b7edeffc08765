#include "files.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace neck {
namespace {

struct Descriptor {
    int number;
    ~Descriptor() {
        if (number >= 0) {
            close(number);
        }
    }
};

[[noreturn]] void fail(int code) { throw std::system_error(code, std::generic_category()); }

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
    // without O_NONBLOCK a pipe would hold the program for ever
    const Descriptor file{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    struct stat about {};
    if (file.number < 0 || fstat(file.number, &about) != 0) {
        fail(errno);
    }
    if (S_ISDIR(about.st_mode)) {
        fail(EISDIR);
    }
    if (!S_ISREG(about.st_mode)) {
        fail(EINVAL);
    }
    size_ = static_cast<std::size_t>(about.st_size);
    if (size_ == 0) {
        return;
    }
    void* address = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.number, 0);
    if (address == MAP_FAILED) {  // NOLINT: the system's own constant
        fail(errno);
    }
    data_ = address;
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) {
        munmap(data_, size_);
    }
}

}  // namespace neck
