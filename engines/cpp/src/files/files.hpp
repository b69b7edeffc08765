#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace neck {

/// A file in memory, read only; the pages are the system's own, so a plan of 1 GB costs no heap.
class MappedFile {
public:
    /// \throws std::system_error it is missing or cannot be read.
    explicit MappedFile(const std::filesystem::path& path);
    ~MappedFile();
    MappedFile(MappedFile&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    MappedFile& operator=(MappedFile&&) = delete;

    const std::byte* data() const { return static_cast<const std::byte*>(data_); }
    std::size_t size() const { return size_; }
    std::string_view text() const { return {static_cast<const char*>(data_), size_}; }

private:
    void* data_ = nullptr;
    std::size_t size_ = 0;
};

/// Writes a file under another name beside it, and renames that when it is on the disk: it is there whole or not at
/// all. \throws std::system_error
void write_whole(const std::filesystem::path& path, const std::vector<std::string_view>& parts);

/// SHA-256 as 64 hexadecimal digits.
std::string sha256(const std::byte* data, std::size_t size);

}  // namespace neck
