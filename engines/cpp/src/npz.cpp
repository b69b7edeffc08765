#include "neck/npz.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <optional>
#include <system_error>

#include "files.hpp"
#include "neck/error.hpp"
#include "text.hpp"
#include "zip.hpp"

namespace neck {
namespace {

/// The text of a key's value in numpy's header, such as `'<f4'` of `{'descr': '<f4', ...}`.
std::string_view value_of(std::string_view header, std::string_view key) {
    const std::size_t found = header.find(key);
    if (found == std::string_view::npos) {
        throw NpzFault{"has a header without " + std::string(key)};
    }
    header.remove_prefix(found + key.size());
    header.remove_prefix(std::min(header.find_first_not_of(": "), header.size()));
    return header;
}

Shape parse_shape(std::string_view text) {
    Shape shape;
    std::optional<std::int64_t> side;
    if (text.empty() || text[0] != '(') {
        throw NpzFault{"has no shape"};
    }
    for (const char letter : text.substr(1)) {
        if (std::isdigit(static_cast<unsigned char>(letter)) != 0) {
            std::int64_t value = side.value_or(0);
            if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, letter - '0', &value)) {
                throw NpzFault{"has a shape that is too large"};
            }
            side = value;
        } else if (letter == ',' || letter == ')') {
            if (side) {
                shape.push_back(*side);
            }
            side.reset();
            if (letter == ')') {
                return shape;
            }
        } else if (letter != ' ') {
            break;
        }
        if (shape.size() > 8) {
            break;
        }
    }
    throw NpzFault{"has a shape that cannot be read"};
}

DataType parse_type(std::string_view text) {
    struct Known {
        std::string_view name;
        DataType type;
    };
    constexpr std::array<Known, 5> known{{{"'|u1'", DataType::uint8},
                                          {"'<f4'", DataType::float32},
                                          {"'<f2'", DataType::float16},
                                          {"'<i4'", DataType::int32},
                                          {"'<i8'", DataType::int64}}};
    for (const auto& [name, type] : known) {
        if (text.substr(0, name.size()) == name) {
            return type;
        }
    }
    throw NpzFault{"is of type " + repr(text.substr(0, std::min<std::size_t>(text.find(','), 20))) +
                   "; expected uint8, int32, int64, float16 or float32"};
}

Tensor parse_array(std::string name, std::string_view content) {
    const Bytes bytes(content);
    if (bytes.cut(0, 6) != "\x93NUMPY") {
        throw NpzFault{"is no array of numpy"};
    }
    const bool first = bytes.number(6, 1) == 1;
    const std::uint64_t start = first ? 10 : 12;
    const std::string_view header = bytes.cut(start, bytes.number(8, first ? 2 : 4));
    if (value_of(header, "'fortran_order'").substr(0, 5) != "False") {
        throw NpzFault{"is in Fortran order; save numpy.ascontiguousarray of it"};
    }
    Tensor tensor{
        std::move(name), parse_type(value_of(header, "'descr'")), parse_shape(value_of(header, "'shape'")), {}};
    const std::string_view data = content.substr(start + header.size());
    if (data.size() != bytes_of(tensor.type, tensor.shape)) {
        throw NpzFault{"has " + std::to_string(data.size()) + " bytes, not those of " + tensor.describe()};
    }
    const auto* begin = reinterpret_cast<const std::byte*>(data.data());
    tensor.data.assign(begin, begin + data.size());
    return tensor;
}

Tensor read_member(const Bytes& file, const Member& member) {
    std::string name = member.name;
    if (name.size() > 4 && name.compare(name.size() - 4, 4, ".npy") == 0) {
        name.resize(name.size() - 4);
    }
    if (!plain(name)) {
        throw NpzFault{"has an array with the odd name " + repr(name)};
    }
    const std::string_view content = content_of(file, member);
    try {
        return parse_array(name, content);
    } catch (const NpzFault& fault) {
        throw NpzFault{repr(name) + " " + fault.why};
    } catch (const Error& error) {
        throw NpzFault{repr(name) + ": " + error.what()};
    }
}

}  // namespace

std::vector<Tensor> read_npz(const std::filesystem::path& path) {
    try {
        const MappedFile mapped(path);
        const Bytes file(mapped.text());
        std::vector<Tensor> tensors;
        std::uint64_t total = 0;
        for (const Member& member : list_members(file)) {
            total += member.size;
            if (total > file.size()) {  // entries that overlap would unpack to far more than the file
                throw NpzFault{"is damaged: its arrays are larger than the file"};
            }
            tensors.push_back(read_member(file, member));
        }
        return tensors;
    } catch (const std::system_error& error) {
        throw Error(path.string() + ": cannot be read (" + error.code().message() +
                    "); `neck-export verify --save-reference` writes it");
    } catch (const NpzFault& fault) {
        throw Error(path.string() + ": " + fault.why + "; write it again by `neck-export verify --save-reference`");
    }
}

Reference read_reference(const std::filesystem::path& path) {
    Reference reference;
    bool found = false;
    for (Tensor& tensor : read_npz(path)) {
        if (tensor.name == "pixels") {
            reference.pixels = std::move(tensor);
            found = true;
        } else if (tensor.type == DataType::float32 && !tensor.shape.empty()) {
            reference.outputs.push_back(std::move(tensor));
        }
    }
    const Tensor& pixels = reference.pixels;
    if (!found || pixels.type != DataType::uint8 || pixels.shape.size() != 4 || pixels.data.empty() ||
        pixels.shape[3] != 3 || reference.outputs.empty()) {
        throw Error(path.string() + ": is no reference, which has uint8 `pixels` (B, H, W, 3) and float32 outputs; " +
                    "write it by `neck-export verify --save-reference`");
    }
    for (const Tensor& output : reference.outputs) {
        if (output.shape[0] != pixels.shape[0]) {
            throw Error(path.string() + ": " + output.name + " is " + to_text(output.shape) + ", but pixels are " +
                        to_text(pixels.shape) + "; write it again by `neck-export verify --save-reference`");
        }
    }
    return reference;
}

}  // namespace neck
