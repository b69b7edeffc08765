#include "neck/safetensors.hpp"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <system_error>
#include <utility>

#include "files/files.hpp"
#include "files/json.hpp"
#include "neck/error.hpp"
#include "files/text.hpp"
#include "tensors/type_names.hpp"

namespace neck {
namespace {

constexpr TypeNames names{"F32", "F16", "BF16", "U8", "I32", "I64"};

DataType type_of(const Json& value) {
    const std::string text = value.is_string() ? value.get<std::string>() : dump_json(value);
    const auto type = type_in(names, text);
    if (!type) {
        throw Fault{"is of type " + repr(text) + "; expected U8, I32, I64, F16, BF16 or F32"};
    }
    return *type;
}

std::vector<std::int64_t> numbers_of(const Json& value) {
    std::vector<std::int64_t> numbers;
    for (const Json& number : value) {
        if (!number.is_number_unsigned() || number.get<std::uint64_t>() > INT64_MAX) {
            throw Fault{"has sides or offsets that are no numbers"};
        }
        numbers.push_back(number.get<std::int64_t>());
    }
    return numbers;
}

/// A tensor without its data, and where they lie.
struct Entry {
    Tensor tensor;
    std::size_t begin = 0;
    std::size_t end = 0;
};

Entry read_entry(const std::string& name, const Json& value) {
    const std::vector<std::int64_t> offsets = numbers_of(value.at("data_offsets"));
    Entry entry{{name, type_of(value.at("dtype")), numbers_of(value.at("shape")), {}}};
    if (offsets.size() != 2 || offsets[0] > offsets[1]) {
        throw Fault{"has no place in the file"};
    }
    entry.begin = static_cast<std::size_t>(offsets[0]);
    entry.end = static_cast<std::size_t>(offsets[1]);
    if (entry.end - entry.begin != bytes_of(entry.tensor.type, entry.tensor.shape)) {
        throw Fault{"has " + std::to_string(entry.end - entry.begin) + " bytes, not those of " +
                    entry.tensor.describe()};
    }
    return entry;
}

/// Takes the header off the beginning of a file; the tensors' bytes are left.
Json take_header(std::string_view& file) {
    std::uint64_t length = 0;
    if (file.size() < sizeof length) {
        throw Fault{"is damaged: it ends too early"};
    }
    std::memcpy(&length, file.data(), sizeof length);
    file.remove_prefix(sizeof length);
    if (length > file.size()) {
        throw Fault{"is no safetensors file, or its end is missing"};
    }
    Json header = parse_json(file.substr(0, length));
    if (!header.is_object()) {
        throw Fault{"its header is no JSON object"};
    }
    file.remove_prefix(length);
    return header;
}

std::vector<Entry> read_entries(const Json& header) {
    std::vector<Entry> entries;
    for (const auto& [name, value] : header.items()) {
        if (name == "__metadata__") {
            continue;
        }
        if (!plain(name)) {
            throw Fault{"has a tensor with the odd name " + repr(name)};
        }
        try {
            entries.push_back(read_entry(name, value));
        } catch (const Fault& fault) {
            throw Fault{repr(name) + " " + fault.why};
        } catch (const Json::exception& error) {
            throw Fault{repr(name) + " is not described as it should be (" + one_line(error.what()) + ")"};
        } catch (const Error& error) {
            throw Fault{repr(name) + ": " + error.what()};
        }
    }
    std::sort(entries.begin(), entries.end(), [](const Entry& left, const Entry& right) {
        return std::pair(left.begin, left.end) < std::pair(right.begin, right.end);
    });
    return entries;
}

std::vector<Tensor> read_tensors(std::string_view data) {
    const Json header = take_header(data);
    std::vector<Tensor> tensors;
    std::size_t place = 0;
    // without gaps and overlaps, as the format demands: nothing is read twice, nothing is hidden
    for (Entry& entry : read_entries(header)) {
        if (entry.begin != place || entry.end > data.size()) {
            throw Fault{"is damaged: " + repr(entry.tensor.name) + " is not where it should be"};
        }
        const auto* begin = reinterpret_cast<const std::byte*>(data.data());
        entry.tensor.data.assign(begin + entry.begin, begin + entry.end);
        place = entry.end;
        tensors.push_back(std::move(entry.tensor));
    }
    if (place != data.size()) {
        throw Fault{"is damaged: it has " + std::to_string(data.size() - place) + " bytes more than its tensors"};
    }
    return tensors;
}

/// Reads a file by `read`, which is given its bytes.
template <typename Read>
auto read_file(const std::filesystem::path& path, Read read) {
    constexpr const char* remedy = "; `neck-export verify --save-reference` writes such a file";
    try {
        const MappedFile file(path);
        return read(file.text());
    } catch (const std::system_error& error) {
        throw Error(path.string() + ": cannot be read (" + error.code().message() + ")" + remedy);
    } catch (const Fault& fault) {
        throw Error(path.string() + ": " + fault.why + remedy);
    }
}

}  // namespace

std::vector<Tensor> read_safetensors(const std::filesystem::path& path) { return read_file(path, read_tensors); }

std::map<std::string, std::string> read_safetensors_metadata(const std::filesystem::path& path) {
    return read_file(path, [](std::string_view file) {
        std::map<std::string, std::string> metadata;
        const Json header = take_header(file);
        const auto found = header.find("__metadata__");
        if (found != header.end() && found->is_object()) {
            for (const auto& [name, value] : found->items()) {
                metadata[name] = value.is_string() ? value.get<std::string>() : dump_json(value);
            }
        }
        return metadata;
    });
}

void write_safetensors(const std::filesystem::path& path, const std::vector<Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
    Json header = Json::object();
    std::vector<std::string_view> parts(2);
    std::size_t place = 0;
    for (const Tensor& tensor : tensors) {
        if (!plain(tensor.name)) {
            throw Error(path.string() + ": " + repr(tensor.name) + " is no name for a tensor; expected UTF-8 text");
        }
        header[tensor.name] = {{"dtype", name_in(names, tensor.type)},
                               {"shape", tensor.shape},
                               {"data_offsets", {place, place + tensor.data.size()}}};
        place += tensor.data.size();
        parts.emplace_back(reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size());
    }
    if (!metadata.empty()) {
        header["__metadata__"] = metadata;
    }
    std::string text = dump_json(header);
    text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the tensors begin at a multiple of 8 bytes
    const std::uint64_t length = text.size();
    parts[0] = {reinterpret_cast<const char*>(&length), sizeof length};
    parts[1] = text;
    try {
        write_whole(path, parts);
    } catch (const std::system_error& error) {
        throw Error(path.string() + ": cannot be written (" + error.code().message() +
                    "); check the folder and the disk");
    }
}

}  // namespace neck
