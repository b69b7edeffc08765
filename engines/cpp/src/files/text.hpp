#pragma once

#include <string>
#include <string_view>

#include "neck/export.hpp"

namespace neck {

/// 'text', as Python's repr writes it, so that odd bytes in a file do no harm on a terminal.
NECK_API std::string repr(std::string_view text);

/// Whether a name is UTF-8 without quotes, backslashes and control characters, so that it can be shown as it is.
NECK_API bool plain(std::string_view name);

/// One line of UTF-8, runs of white space made one space, about 400 bytes at most.
NECK_API std::string one_line(std::string_view text);

/// printf into a string.
[[gnu::format(printf, 1, 2)]] NECK_API std::string format(const char* pattern, ...);

/// `a, b, c`
template <typename Range, typename Name>
std::string joined(const Range& range, Name name_of_each) {
    std::string text;
    for (const auto& each : range) {
        text += (text.empty() ? "" : ", ") + std::string(name_of_each(each));
    }
    return text;
}

}  // namespace neck
