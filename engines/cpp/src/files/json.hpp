#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "neck/export.hpp"

namespace neck {

using Json = nlohmann::json;

/// What is wrong with a file or an answer, in the middle of a message: whoever reads it adds its name and the remedy.
struct NECK_API Fault {
    std::string why;
};

/// Parses a text; what is no JSON, or nested more than 64 levels deep, comes back as a discarded value. Here alone:
/// nlohmann's parser costs a third of a library's compilation.
NECK_API Json parse_json(std::string_view text);

/// The same, and says why not.
/// \throws Fault
NECK_API Json parse_json_or_say(std::string_view text);

/// One line of ASCII and UTF-8; bytes that are neither are replaced.
NECK_API std::string dump_json(const Json& json);

/// The value of a key.
/// \throws Fault no object, or one that lacks the key.
NECK_API const Json& at(const Json& object, const char* key);

/// \throws Fault as `at`, or the value is of another kind.
NECK_API std::string text_at(const Json& object, const char* key);
NECK_API const Json& list_at(const Json& object, const char* key);

/// The text of a key; empty where there is none.
NECK_API std::string text_or_empty(const Json& object, const char* key);

}  // namespace neck
