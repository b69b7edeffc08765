#include "files/files.hpp"

#include <fcntl.h>
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

// without O_NONBLOCK a pipe would hold the program for ever
OpenFile::OpenFile(const std::filesystem::path& path) : number_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    struct stat about {};
    const bool known = number_ >= 0 && fstat(number_, &about) == 0;
    const int code = !known ? errno : S_ISDIR(about.st_mode) ? EISDIR : !S_ISREG(about.st_mode) ? EINVAL : 0;
    if (code != 0) {
        if (number_ >= 0) {
            close(number_);
        }
        fail(code);
    }
    size_ = static_cast<std::size_t>(about.st_size);
    modified_ns_ = std::int64_t{about.st_mtim.tv_sec} * 1'000'000'000 + about.st_mtim.tv_nsec;
}

OpenFile::~OpenFile() { close(number_); }

void OpenFile::read(std::byte* target, std::size_t bytes) {
    while (bytes > 0) {
        const ssize_t got = ::read(number_, target, bytes);
        if (got < 0 && errno != EINTR) {
            fail(errno);
        }
        if (got == 0) {
            throw Ended();
        }
        if (got > 0) {
            target += got;
            bytes -= static_cast<std::size_t>(got);
        }
    }
}

FileBytes read_file(const std::filesystem::path& path, std::size_t most) {
    OpenFile file(path);
    if (file.size() > most) {
        fail(EFBIG);
    }
    FileBytes bytes(file.size());
    file.read(bytes.data(), bytes.size());
    return bytes;
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

}  // namespace neck
