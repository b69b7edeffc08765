#include "neck/safetensors.hpp"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <system_error>
#include <utility>

#include "files/files.hpp"
#include "files/guard.hpp"
#include "files/json.hpp"
#include "neck/error.hpp"
#include "files/text.hpp"
#include "tensors/type_names.hpp"

namespace neck {
namespace {

constexpr std::size_t largest_header = 100'000'000;  // that of the safetensors package, too

constexpr TypeNames names{"F32", "F16", "BF16", "U8", "I32", "I64"};

DataType type_of(const std::string& name, const Json& value) {
    const std::string text = value.is_string() ? value.get<std::string>() : dump_json(value);
    const auto type = type_in(names, text);
    if (!type) {
        throw Fault{"tensor " + repr(name) + " has type " + repr(text) +
                    ", but only U8, I32, I64, F16, BF16 and F32 are supported"};
    }
    return *type;
}

std::vector<std::int64_t> numbers_of(const std::string& name, const Json& value) {
    std::vector<std::int64_t> numbers;
    for (const Json& number : value) {
        if (!number.is_number_unsigned() || number.get<std::uint64_t>() > INT64_MAX) {
            throw Fault{"tensor " + repr(name) + " has a size or an offset that is not a valid whole number"};
        }
        numbers.push_back(number.get<std::int64_t>());
    }
    return numbers;
}

/// A tensor without its data, and where they lie.
struct Entry {
    std::string name;
    DataType type = DataType::float32;
    Shape shape;
    std::size_t begin = 0;
    std::size_t end = 0;
};

Entry read_entry(const std::string& name, const Json& value) {
    const std::vector<std::int64_t> offsets = numbers_of(name, value.at("data_offsets"));
    Entry entry{name, type_of(name, value.at("dtype")), numbers_of(name, value.at("shape"))};
    if (offsets.size() != 2 || offsets[0] > offsets[1]) {
        throw Fault{"tensor " + repr(name) + " has invalid data offsets"};
    }
    entry.begin = static_cast<std::size_t>(offsets[0]);
    entry.end = static_cast<std::size_t>(offsets[1]);
    if (entry.end - entry.begin != bytes_of(entry.type, entry.shape)) {
        throw Fault{"tensor " + repr(name) + " is declared as " + std::string(neck::name_of(entry.type)) + " " +
                    to_text(entry.shape) + ", but its data have " + std::to_string(entry.end - entry.begin) + " bytes"};
    }
    return entry;
}

/// Reads the header of a file; the tensors' bytes follow.
/// \param data gets how many those are.
Json read_header(OpenFile& file, std::size_t& data) {
    std::uint64_t length = 0;
    if (file.size() < sizeof length) {
        throw Fault{"the file is damaged, because it ends too early"};
    }
    file.read(reinterpret_cast<std::byte*>(&length), sizeof length);
    data = file.size() - sizeof length;
    if (length > data) {
        throw Fault{"the file is truncated or is not a safetensors file"};
    }
    if (length > largest_header) {
        throw Fault{"the file's header has " + std::to_string(length) + " bytes, but at most " +
                    std::to_string(largest_header) + " are allowed"};
    }
    FileBytes text(length);
    file.read(text.data(), length);
    data -= length;
    Json header = parse_json(text.text());
    if (!header.is_object()) {
        throw Fault{"the file's header is not a JSON object"};
    }
    return header;
}

std::vector<Entry> read_entries(const Json& header) {
    std::vector<Entry> entries;
    for (const auto& [name, value] : header.items()) {
        if (name == "__metadata__") {
            continue;
        }
        if (!plain(name)) {
            throw Fault{"the file contains a tensor with the invalid name " + repr(name)};
        }
        try {
            entries.push_back(read_entry(name, value));
        } catch (const Json::exception& error) {
            throw Fault{"tensor " + repr(name) + " has an invalid entry in the header (" + one_line(error.what()) +
                        ")"};
        } catch (const Error& error) {
            throw Fault{"tensor " + repr(name) + " is invalid (" + error.what() + ")"};
        }
    }
    std::sort(entries.begin(), entries.end(), [](const Entry& left, const Entry& right) {
        return std::pair(left.begin, left.end) < std::pair(right.begin, right.end);
    });
    return entries;
}

/// The tensors in the order of their bytes, which have neither gaps nor overlaps, as the format demands: nothing is read
/// twice, nothing is hidden.
std::vector<Entry> read_places(const Json& header, std::size_t data) {
    std::vector<Entry> entries = read_entries(header);
    std::size_t place = 0;
    for (const Entry& entry : entries) {
        if (entry.begin != place || entry.end > data) {
            throw Fault{"the file is damaged: the data offsets of tensor " + repr(entry.name) +
                        " in the header do not match the data in the file"};
        }
        place = entry.end;
    }
    if (place != data) {
        throw Fault{"the file is damaged, because " + std::to_string(data - place) + " bytes belong to no tensor"};
    }
    return entries;
}

/// Reads a file by `read`, which is given it.
/// \param remedy ends the message about a file that is not as it should be.
template <typename Read>
auto read_by(const std::filesystem::path& path, const char* remedy, Read read) {
    return guarded(path, [&] {
        try {
            OpenFile file(path);
            return read(file);
        } catch (const OpenFile::Ended&) {
            throw Error(path.string() +
                        ": the file became shorter while it was read; try again when it is "
                        "complete");
        } catch (const std::system_error& error) {
            throw Error(path.string() + ": the file cannot be read (" + error.code().message() +
                        "); check the path and its permissions");
        } catch (const Fault& fault) {
            throw Error(path.string() + ": " + fault.why + remedy);
        }
    });
}

}  // namespace

std::vector<Tensor> read_safetensors(const std::filesystem::path& path) {
    return read_by(path, "; `neck-export verify --save-reference` writes a valid file", [](OpenFile& file) {
        std::size_t data = 0;
        const Json header = read_header(file, data);
        std::vector<Tensor> tensors;
        for (Entry& entry : read_places(header, data)) {
            tensors.emplace_back(std::move(entry.name), entry.type, std::move(entry.shape));
            file.read(tensors.back().data.data(), tensors.back().data.size());
        }
        return tensors;
    });
}

std::map<std::string, std::string> read_safetensors_metadata(const std::filesystem::path& path) {
    return read_by(path, "", [](OpenFile& file) {
        std::size_t data = 0;
        const Json header = read_header(file, data);
        read_places(header, data);
        std::map<std::string, std::string> metadata;
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
    guarded(path, [&] {
        Json header = Json::object();
        std::vector<std::string_view> parts(2);
        std::size_t place = 0;
        for (const Tensor& tensor : tensors) {
            if (!plain(tensor.name) || tensor.name == "__metadata__" || header.contains(tensor.name)) {
                throw Error(path.string() + ": " + repr(tensor.name) +
                            " is not a valid tensor name. A name must be valid UTF-8 without quotes, must occur only "
                            "once, and must not be __metadata__");
            }
            tensor.check();
            header[tensor.name] = {{"dtype", name_in(names, tensor.type)},
                                   {"shape", tensor.shape},
                                   {"data_offsets", {place, place + tensor.data.size()}}};
            place += tensor.data.size();
            parts.emplace_back(reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size());
        }
        if (!metadata.empty()) {
            header["__metadata__"] = metadata;
        }
        std::string text;
        try {
            text = header.dump();
        } catch (const Json::exception&) {
            throw Error(path.string() +
                        ": the metadata must be UTF-8 text; encode binary values, for example as hexadecimal digits");
        }
        text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the tensors begin at a multiple of 8 bytes
        if (text.size() > largest_header) {
            throw Error(path.string() + ": the header would have " + std::to_string(text.size()) +
                        " bytes, but at most " + std::to_string(largest_header) +
                        " are allowed; write fewer tensors or less metadata");
        }
        const std::uint64_t length = text.size();
        parts[0] = {reinterpret_cast<const char*>(&length), sizeof length};
        parts[1] = text;
        try {
            write_whole(path, parts);
        } catch (const std::system_error& error) {
            throw Error(path.string() + ": the file cannot be written (" + error.code().message() +
                        "); check the folder's permissions and the free disk space");
        }
    });
}

}  // namespace neck
