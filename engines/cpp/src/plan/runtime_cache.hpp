#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace neck {

/// What TensorRT-RTX compiled, in a file: for one plan on one GPU, driver and version.
class RuntimeCache {
public:
    /// \param path empty: no file, nothing is read or written.
    RuntimeCache(std::filesystem::path path, std::string key);
    RuntimeCache() = default;

    /// What is in the file; empty where there is none, or none of ours.
    /// \param why_not gets one line where a file is there that cannot be used.
    std::string read(std::string& why_not);

    /// Writes the file where that is new; the old one is there until the new one is whole.
    /// \return one line where it cannot be written, else nothing.
    std::string write(std::string_view content);

private:
    std::filesystem::path path_;
    std::string key_;
    std::string written_;  ///< SHA-256 of what the file has
};

}  // namespace neck
