#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "neck/export.hpp"

namespace neck {

/// The bytes of a file, in memory of the process: a file that is cut or replaced meanwhile cannot touch them, while a
/// page of a mapped file that is gone ends the process with SIGBUS.
class FileBytes {
public:
    explicit FileBytes(std::size_t size) : data_(new std::byte[size]), size_(size) {}  // not filled with zeros first

    std::byte* data() { return data_.get(); }
    const std::byte* data() const { return data_.get(); }
    std::size_t size() const { return size_; }
    std::string_view text() const { return {reinterpret_cast<const char*>(data_.get()), size_}; }

private:
    std::unique_ptr<std::byte[]> data_;  // NOLINT(modernize-avoid-c-arrays): std::vector would fill it
    std::size_t size_;
};

/// A file that is open for reading, from its beginning on.
class NECK_API OpenFile {
public:
    /// \throws std::system_error it is missing, or no regular file.
    explicit OpenFile(const std::filesystem::path& path);
    ~OpenFile();
    OpenFile(const OpenFile&) = delete;
    OpenFile& operator=(const OpenFile&) = delete;

    /// When it was opened.
    std::size_t size() const { return size_; }
    std::int64_t modified_ns() const { return modified_ns_; }

    /// Reads the next bytes.
    /// \throws Ended there are fewer: the file was cut after it was opened.
    void read(std::byte* target, std::size_t bytes);

    /// What `read` throws.
    class NECK_API Ended : public std::system_error {
    public:
        Ended()
            : std::system_error(std::make_error_code(std::errc::io_error),
                                "the file became shorter while it was read") {}
    };

private:
    int number_;
    std::size_t size_ = 0;
    std::int64_t modified_ns_ = 0;
};

/// Reads a whole file.
/// \param most bytes that it may have.
/// \throws std::system_error it cannot be read, is larger, or became shorter meanwhile.
NECK_API FileBytes read_file(const std::filesystem::path& path, std::size_t most = SIZE_MAX);

/// SHA-256 of a whole file, of which a piece at a time is in memory.
/// \throws std::system_error
NECK_API std::string sha256_of_file(const std::filesystem::path& path);

/// Writes a file under another name beside it, and renames that when it is on the disk: it is there whole or not at
/// all. \throws std::system_error
NECK_API void write_whole(const std::filesystem::path& path, const std::vector<std::string_view>& parts);

/// SHA-256 as 64 hexadecimal digits.
NECK_API std::string sha256(const std::byte* data, std::size_t size);

}  // namespace neck
