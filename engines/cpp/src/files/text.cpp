#include "files/text.hpp"

#include <cstdarg>
#include <cstdio>

namespace neck {
namespace {

constexpr std::size_t longest_line = 400;

/// Bytes of the UTF-8 letter that begins the text; 0 where none does.
std::size_t letter_size(std::string_view text) {
    const auto first = static_cast<unsigned char>(text[0]);
    const std::size_t size = first < 0x80   ? 1
                             : first < 0xc2 ? 0
                             : first < 0xe0 ? 2
                             : first < 0xf0 ? 3
                             : first < 0xf5 ? 4
                                            : 0;
    if (size > text.size()) {
        return 0;
    }
    for (std::size_t index = 1; index < size; ++index) {
        if ((static_cast<unsigned char>(text[index]) & 0xc0U) != 0x80U) {
            return 0;
        }
    }
    return size;
}

}  // namespace

std::string repr(std::string_view text) {
    std::string shown = "'";
    while (!text.empty()) {
        const std::size_t size = letter_size(text);
        const auto byte = static_cast<unsigned char>(text[0]);
        if (size == 0 || byte < 0x20 || byte == 0x7f) {
            shown += format("\\x%02x", byte);
        } else {
            shown += text[0] == '\'' || text[0] == '\\' ? "\\" : "";
            shown += text.substr(0, size);
        }
        text.remove_prefix(size == 0 ? 1 : size);
    }
    return shown + "'";
}

bool plain(std::string_view name) { return repr(name).size() == name.size() + 2; }

std::string one_line(std::string_view text) {
    std::string line;
    while (!text.empty() && line.size() < longest_line) {
        const std::size_t size = letter_size(text);
        if (size == 0) {
            line += format("\\x%02x", static_cast<unsigned char>(text[0]));
        } else if (static_cast<unsigned char>(text[0]) > 0x20 && text[0] != 0x7f) {
            line += text.substr(0, size);
        } else if (!line.empty() && line.back() != ' ') {
            line += ' ';
        }
        text.remove_prefix(size == 0 ? 1 : size);
    }
    while (!line.empty() && line.back() == ' ') {
        line.pop_back();
    }
    return line;
}

std::string format(const char* pattern, ...) {
    va_list arguments;
    va_start(arguments, pattern);
    va_list again;
    va_copy(again, arguments);
    const int length = std::vsnprintf(nullptr, 0, pattern, arguments);
    va_end(arguments);
    std::string text(length > 0 ? static_cast<std::size_t>(length) : 0, '\0');
    std::vsnprintf(text.data(), text.size() + 1, pattern, again);
    va_end(again);
    return text;
}

}  // namespace neck
