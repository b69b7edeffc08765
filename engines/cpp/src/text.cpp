#include "text.hpp"

#include <cstdarg>
#include <cstdio>

namespace neck {

std::string repr(std::string_view text) {
    std::string shown = "'";
    for (const char letter : text) {
        const auto byte = static_cast<unsigned char>(letter);
        if (letter == '\'' || letter == '\\') {
            shown += {'\\', letter};
        } else if (byte < 0x20 || byte == 0x7f) {
            shown += format("\\x%02x", byte);
        } else {
            shown += letter;
        }
    }
    return shown + "'";
}

std::string one_line(std::string_view text) {
    std::string line;
    for (const char letter : text) {
        const bool space = static_cast<unsigned char>(letter) <= 0x20;
        if (!space) {
            line += letter;
        } else if (!line.empty() && line.back() != ' ') {
            line += ' ';
        }
    }
    while (!line.empty() && line.back() == ' ') {
        line.pop_back();
    }
    return line.substr(0, 400);
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
