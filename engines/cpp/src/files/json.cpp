#include "files/json.hpp"

#include <string>

#include "files/text.hpp"

namespace neck {
namespace {

constexpr int deepest = 64;  // of our own files: 6; writing a value goes down by a function call for each level

/// Whether brackets outside strings are nested deeper than is taken.
bool too_deep(std::string_view text) {
    int depth = 0;
    bool quoted = false;
    for (std::size_t at = 0; at < text.size(); ++at) {
        const char letter = text[at];
        if (quoted) {
            at += letter == '\\' ? 1 : 0;
            quoted = letter != '"';
        } else if (letter == '"') {
            quoted = true;
        } else if (letter == '[' || letter == '{') {
            if (++depth > deepest) {
                return true;
            }
        } else if (letter == ']' || letter == '}') {
            --depth;
        }
    }
    return false;
}

}  // namespace

Json parse_json(std::string_view text) {
    return too_deep(text) ? Json(Json::value_t::discarded) : Json::parse(text, nullptr, false);
}

Json parse_json_or_say(std::string_view text) {
    if (too_deep(text)) {
        throw Fault{"the JSON is nested more than " + std::to_string(deepest) + " levels deep"};
    }
    try {
        return Json::parse(text);
    } catch (const Json::exception& error) {
        throw Fault{one_line(error.what())};
    }
}

std::string dump_json(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

const Json& at(const Json& object, const char* key) {
    if (!object.is_object()) {
        throw Fault{"a JSON object with " + repr(key) + " is expected, but " + object.type_name() + " was found"};
    }
    const auto found = object.find(key);
    if (found == object.end()) {
        throw Fault{"the entry " + repr(key) + " is missing"};
    }
    return *found;
}

std::string text_at(const Json& object, const char* key) {
    const Json& value = at(object, key);
    if (!value.is_string()) {
        throw Fault{repr(key) + " must be a string, but is of type " + value.type_name()};
    }
    return value.get<std::string>();
}

const Json& list_at(const Json& object, const char* key) {
    const Json& value = at(object, key);
    if (!value.is_array()) {
        throw Fault{repr(key) + " must be a list, but is of type " + value.type_name()};
    }
    return value;
}

std::string text_or_empty(const Json& object, const char* key) {
    const auto found = object.is_object() ? object.find(key) : object.end();
    return found != object.end() && found->is_string() ? found->get<std::string>() : std::string();
}

}  // namespace neck
