#include "files/files.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <string>
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

void write_whole(const std::filesystem::path& path, const std::vector<std::string_view>& parts) {
    std::string staged = path.string() + ".XXXXXX";
    const Descriptor file{mkstemp(staged.data())};  // its own, whoever else writes the same
    try {
        if (file.number < 0 || fchmod(file.number, 0644) != 0) {
            fail(errno);
        }
        for (std::string_view part : parts) {
            while (!part.empty()) {
                const ssize_t written = write(file.number, part.data(), part.size());
                if (written < 0 && errno != EINTR) {
                    fail(errno);
                }
                part.remove_prefix(written > 0 ? static_cast<std::size_t>(written) : 0);
            }
        }
        if (fsync(file.number) != 0 || rename(staged.c_str(), path.c_str()) != 0) {
            fail(errno);
        }
    } catch (...) {
        if (file.number >= 0) {
            unlink(staged.c_str());
        }
        throw;
    }
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) {
        munmap(data_, size_);
    }
}

}  // namespace neck
