#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>

#include "neck/tensor.hpp"

namespace neck {

/// How a format calls the types, in the order of DataType.
using TypeNames = std::array<std::string_view, 6>;

inline std::string_view name_in(const TypeNames& names, DataType type) {
    return names.at(static_cast<std::size_t>(type));
}

inline std::optional<DataType> type_in(const TypeNames& names, std::string_view name) {
    const auto* const found = std::find(names.begin(), names.end(), name);
    return found == names.end() ? std::nullopt : std::optional(static_cast<DataType>(found - names.begin()));
}

}  // namespace neck
