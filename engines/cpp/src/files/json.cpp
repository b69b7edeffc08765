#include "files/json.hpp"

#include "files/text.hpp"

namespace neck {

Json parse_json(std::string_view text) { return Json::parse(text, nullptr, false); }

Json parse_json_or_say(std::string_view text) {
    try {
        return Json::parse(text);
    } catch (const Json::exception& error) {
        throw Fault{one_line(error.what())};
    }
}

std::string dump_json(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

const Json& at(const Json& object, const char* key) {
    if (!object.is_object()) {
        throw Fault{std::string(object.type_name()) + " where an object with " + repr(key) + " is expected"};
    }
    const auto found = object.find(key);
    if (found == object.end()) {
        throw Fault{"lacks " + repr(key)};
    }
    return *found;
}

std::string text_at(const Json& object, const char* key) {
    const Json& value = at(object, key);
    if (!value.is_string()) {
        throw Fault{repr(key) + " is " + value.type_name() + ", expected a string"};
    }
    return value.get<std::string>();
}

const Json& list_at(const Json& object, const char* key) {
    const Json& value = at(object, key);
    if (!value.is_array()) {
        throw Fault{repr(key) + " is " + value.type_name() + ", expected a list"};
    }
    return value;
}

std::string text_or_empty(const Json& object, const char* key) {
    const auto found = object.is_object() ? object.find(key) : object.end();
    return found != object.end() && found->is_string() ? found->get<std::string>() : std::string();
}

}  // namespace neck
