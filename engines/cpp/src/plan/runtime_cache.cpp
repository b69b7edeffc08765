#include "plan/runtime_cache.hpp"

#include <system_error>
#include <utility>

#include "files/files.hpp"
#include "files/text.hpp"

namespace neck {
namespace {

// the first line of the file; then its key, the SHA-256 of what follows, and that
constexpr std::string_view magic = "neck-export runtime cache 1\n";

std::string hash_of(std::string_view content) {
    return sha256(reinterpret_cast<const std::byte*>(content.data()), content.size());
}

/// Takes a line off the beginning of a text.
std::string_view take_line(std::string_view& text) {
    const std::size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    return line;
}

}  // namespace

RuntimeCache::RuntimeCache(std::filesystem::path path, std::string key)
    : path_(std::move(path)), key_(std::move(key)) {}

std::string RuntimeCache::read(std::string& why_not) {
    if (path_.empty()) {
        return {};
    }
    const auto dropped = [&](const std::string& why) {
        why_not = path_.string() + ": " + why + "; the kernels are compiled again";
        return std::string();
    };
    try {
        const FileBytes file = read_file(path_);
        std::string_view text = file.text();
        if (text.substr(0, magic.size()) != magic) {
            return dropped("the file is not a runtime cache");
        }
        text.remove_prefix(magic.size());
        const std::string_view key = take_line(text);
        const std::string_view hash = take_line(text);
        if (hash_of(text) != hash) {
            return dropped("the runtime cache is damaged");
        }
        if (key != key_) {
            return dropped("the runtime cache is for " + one_line(key) + ", but this program uses " + key_);
        }
        written_ = hash;
        return std::string(text);
    } catch (const std::system_error& error) {
        return error.code() == std::errc::no_such_file_or_directory
                   ? std::string()
                   : dropped("the runtime cache cannot be read (" + error.code().message() + ")");
    }
}

std::string RuntimeCache::write(std::string_view content) {
    if (path_.empty() || content.empty()) {
        return {};
    }
    std::string hash = hash_of(content);
    if (hash == written_) {
        return {};
    }
    written_ = hash;  // also where it fails: once is enough to be told
    try {
        write_whole(path_, {magic, key_, "\n", hash, "\n", content});
        return {};
    } catch (const std::system_error& error) {
        return path_.string() + ": the runtime cache cannot be written (" + error.code().message() +
               "); the next start compiles the kernels again";
    }
}

}  // namespace neck
