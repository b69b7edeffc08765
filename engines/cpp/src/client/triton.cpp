#include "neck/triton.hpp"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <utility>

#include "client/http.hpp"
#include "files/guard.hpp"
#include "files/json.hpp"
#include "files/text.hpp"
#include "tensors/type_names.hpp"

namespace neck {
namespace {

constexpr TypeNames names{"FP32", "FP16", "BF16", "UINT8", "INT32", "INT64"};
constexpr std::string_view bytes_type = "BYTES";  // elements of any length, each after its length in 4 bytes

Json parse(std::string_view text) {
    Json json = parse_json(text);
    if (!json.is_object()) {
        throw Fault{"the answer is not a JSON object"};
    }
    return json;
}

std::string name_of(const Json& object) {
    std::string name = text_or_empty(object, "name");
    if (name.empty() || !plain(name)) {
        throw Fault{"the server's answer gives a model or tensor the invalid name " + repr(name) +
                    ". A name must not be empty and must not contain single quotes, backslashes, "
                    "control characters or invalid UTF-8"};
    }
    return name;
}

const Json& list_of(const Json& object, const char* key) {
    const auto found = object.find(key);
    if (found == object.end() || !found->is_array()) {
        throw Fault{"the answer does not contain the list " + repr(key)};
    }
    return *found;
}

DataType type_of(const Json& tensor) {
    const std::string text = text_or_empty(tensor, "datatype");
    const auto type = type_in(names, text);
    if (!type) {
        throw Fault{"tensor " + repr(text_or_empty(tensor, "name")) + " has type " + repr(text) +
                    ", but only FP32, FP16, BF16, UINT8, INT32 and INT64 are supported"};
    }
    return *type;
}

Shape shape_of(const Json& tensor) {
    Shape shape;
    for (const Json& side : list_of(tensor, "shape")) {
        if (!side.is_number_integer()) {
            throw Fault{"the shape of tensor " + repr(text_or_empty(tensor, "name")) + " does not consist of integers"};
        }
        shape.push_back(side.get<std::int64_t>());
    }
    return shape;
}

/// \param bytes gets the tensors of type BYTES; nullptr: they are refused.
std::vector<Port> read_ports(const Json& metadata, const char* key, std::int64_t largest_batch,
                             std::vector<BytesPort>* bytes) {
    std::vector<Port> ports;
    for (const Json& tensor : list_of(metadata, key)) {
        if (!tensor.is_object()) {
            throw Fault{"the server's answer does not follow Triton's HTTP protocol: the list " + repr(key) +
                        " in the answer contains entries that are not JSON objects"};
        }
        if (bytes != nullptr && text_or_empty(tensor, "datatype") == bytes_type) {
            bytes->push_back({name_of(tensor), shape_of(tensor), largest_batch});
            continue;
        }
        Port port{name_of(tensor), type_of(tensor), shape_of(tensor)};
        if (port.shape.empty()) {
            throw Fault{"according to the model's metadata on the server, the shape of the tensor " +
                        repr(port.name) +
                        " has no dimensions, but the shape must have at least the batch dimension; check the "
                        "field 'dims' of the tensor in the model's config.pbtxt"};
        }
        port.largest_batch = port.shape[0] < 0 ? largest_batch : port.shape[0];
        port.smallest_batch = port.shape[0] < 0 ? 1 : port.shape[0];
        port.optimum_batch = port.smallest_batch;
        ports.push_back(std::move(port));
    }
    return ports;
}

/// Bytes of an output after the JSON; Triton gives them in the order of the JSON.
std::size_t binary_size(const Json& output) {
    const auto parameters = output.find("parameters");
    if (parameters != output.end() && parameters->is_object()) {
        const auto size = parameters->find("binary_data_size");
        if (size != parameters->end() && size->is_number_unsigned()) {
            return size->get<std::size_t>();
        }
    }
    throw Fault{"the server's answer gives no valid binary_data_size for the output " +
                repr(text_or_empty(output, "name")) + ", but the client requested every output as binary data"};
}

std::vector<Tensor> read_outputs(const Answer& answer) {
    if (answer.header_length == 0 || answer.header_length > answer.body.size()) {
        throw Fault{
            "the HTTP header Inference-Header-Content-Length, which says where the binary data begin, is missing or "
            "wrong"};
    }
    const Json json = parse(std::string_view(answer.body).substr(0, answer.header_length));
    std::string_view rest = std::string_view(answer.body).substr(answer.header_length);
    std::vector<Tensor> outputs;
    for (const Json& output : list_of(json, "outputs")) {
        if (!output.is_object()) {
            throw Fault{
                "the server's answer does not follow Triton's HTTP protocol: the list 'outputs' in the answer contains "
                "entries that are not JSON objects"};
        }
        const std::string name = name_of(output);
        const DataType type = type_of(output);
        const Shape shape = shape_of(output);
        const std::size_t size = binary_size(output);
        if (size != bytes_of(type, shape) || size > rest.size()) {
            throw Fault{"output " + repr(name) + " is declared as " + std::string(neck::name_of(type)) + " " +
                        to_text(shape) + ", but its data have " + std::to_string(std::min(size, rest.size())) +
                        " bytes"};
        }
        const auto* begin = reinterpret_cast<const std::byte*>(rest.data());
        outputs.emplace_back(name, type, shape, std::vector<std::byte>(begin, begin + size));
        rest.remove_prefix(size);
    }
    if (!rest.empty()) {
        throw Fault{"the answer contains " + std::to_string(rest.size()) + " bytes after the last output"};
    }
    return outputs;
}

/// The server's own words where it gives some.
std::string server_error(const Answer& answer) {
    const std::string told = text_or_empty(parse_json(answer.body), "error");
    return one_line(told.empty() ? std::string_view(answer.body).substr(0, 400) : std::string_view(told));
}

/// What is sent before the bytes of an input.
std::string request_json(const std::string& name, std::string_view type, const Shape& shape, std::size_t bytes,
                         const std::vector<std::string>& outputs) {
    Json request;
    request["inputs"] = Json::array({{{"name", name},
                                      {"datatype", type},
                                      {"shape", shape},
                                      {"parameters", {{"binary_data_size", bytes}}}}});
    for (const std::string& output : outputs) {
        request["outputs"].push_back({{"name", output}, {"parameters", {{"binary_data", true}}}});
    }
    return dump_json(request);
}

const Port* find(const std::vector<Port>& ports, const std::string& name) {
    const auto found = std::find_if(ports.begin(), ports.end(), [&](const Port& port) { return port.name == name; });
    return found == ports.end() ? nullptr : &*found;
}

/// Whether an output has the type and shape that the model's metadata give, for this batch.
bool fits(const Port& port, const Tensor& output, std::int64_t batch) {
    bool right = port.type == output.type && port.shape.size() == output.shape.size();
    for (std::size_t side = 0; right && side < port.shape.size(); ++side) {
        const std::int64_t wanted = port.shape[side] < 0 && side == 0 ? batch : port.shape[side];
        right = wanted < 0 || wanted == output.shape[side];
    }
    return right;
}

/// Whether an answer has exactly the outputs that were asked for, each whole.
/// \throws Fault
void check_whole(const std::vector<Tensor>& found, const TritonModel& model, const std::vector<std::string>& wanted,
                 std::int64_t batch) {
    for (const std::string& name : wanted) {
        const auto count =
            std::count_if(found.begin(), found.end(), [&](const Tensor& output) { return output.name == name; });
        if (count == 0) {
            throw Fault{"the server's answer does not contain the output " + repr(name) +
                        ", although the request asked for this output. All outputs that the request asked for: " +
                        joined(wanted, [](const std::string& each) { return each; }) +
                        ". Look for the cause in the server's log"};
        }
        if (count > 1) {
            throw Fault{"the server's answer contains the output " + repr(name) +
                        " more than once, but must contain each requested output exactly once. The requested outputs "
                        "are " + joined(wanted, [](const std::string& each) { return each; })};
        }
    }
    for (const Tensor& output : found) {
        const Port* port = find(model.outputs, output.name);
        if (port == nullptr || found.size() != wanted.size()) {
            throw Fault{"the server's answer contains the outputs " +
                        joined(found, [](const Tensor& each) { return each.name; }) +
                        ", but the requested outputs are " +
                        joined(wanted, [](const std::string& each) { return each; })};
        }
        if (!fits(*port, output, batch)) {
            throw Fault{"the server returned output " + output.name + " as " + output.describe() + " for a batch of " +
                        std::to_string(batch) + ", but the model's metadata declare it as " +
                        std::string(neck::name_of(port->type)) + " " + to_text(port->shape)};
        }
    }
}

}  // namespace

class TritonClient::Impl {
public:
    Impl(std::string url, const TritonOptions& options) : http(std::move(url), options) {}

    std::string path_of(const std::string& model, const std::string& version) const {
        return "v2/models/" + http.escape(model) + (version.empty() ? "" : "/versions/" + http.escape(version));
    }

    /// \param use takes a good answer and may throw a Fault.
    template <typename Use>
    auto take(const std::string& path, const Answer& answer, Use use) {
        const std::string address = http.url() + "/" + path;
        if (answer.status != 200) {
            throw Error(address + ": the server refused the request (HTTP " + std::to_string(answer.status) +
                        "): " + server_error(answer));
        }
        constexpr const char* hint = "check that the server is Triton and supports the binary tensor data extension";
        try {
            return use();
        } catch (const Fault& fault) {
            throw Error(address + ": " + one_line(fault.why) + "; " + hint);
        } catch (const Json::exception& error) {
            throw Error(address + ": the answer cannot be parsed (" + one_line(error.what()) + "); " + hint);
        } catch (const Error& error) {
            throw Error(address + ": the answer cannot be parsed (" + one_line(error.what()) + "); " + hint);
        }
    }

    TritonModel model(const std::string& name, const std::string& version);

    /// Sends an input, whose bytes are given, and returns the outputs, which are whole.
    std::vector<Tensor> infer(const std::string& model_name, const std::string& version,
                              const std::function<std::string(const std::vector<std::string>&)>& request,
                              std::string_view bytes, std::int64_t batch, std::vector<std::string> outputs);

    Http http;

private:
    std::map<std::pair<std::string, std::string>, TritonModel> known_;  ///< by name and version
};

TritonModel TritonClient::Impl::model(const std::string& name, const std::string& version) {
    const std::string path = path_of(name, version);
    const Answer config = http.get(path + "/config");
    const std::int64_t largest = take(path + "/config", config, [&] {
        const Json json = parse(config.body);
        const auto found = json.find("max_batch_size");
        return found != json.end() && found->is_number_integer() ? std::max<std::int64_t>(1, found->get<std::int64_t>())
                                                                 : 1;
    });
    const Answer answer = http.get(path);
    TritonModel read = take(path, answer, [&] {
        const Json json = parse(answer.body);
        TritonModel model;
        model.name = name_of(json);
        model.platform = one_line(text_or_empty(json, "platform"));
        model.inputs = read_ports(json, "inputs", largest, &model.bytes_inputs);
        model.outputs = read_ports(json, "outputs", largest, nullptr);
        if (json.contains("versions")) {
            for (const Json& each : list_of(json, "versions")) {
                model.versions.push_back(each.is_string() ? each.get<std::string>() : "?");
            }
        }
        return model;
    });
    known_[{name, version}] = read;
    return read;
}

std::vector<Tensor> TritonClient::Impl::infer(
    const std::string& model_name, const std::string& version,
    const std::function<std::string(const std::vector<std::string>&)>& request, std::string_view bytes,
    std::int64_t batch, std::vector<std::string> outputs) {
    const auto found = known_.find({model_name, version});
    const TritonModel described = found == known_.end() ? model(model_name, version) : found->second;
    if (outputs.empty()) {
        for (const Port& port : described.outputs) {
            outputs.push_back(port.name);
        }
    }
    const std::string path = path_of(model_name, version) + "/infer";
    try {
        const Answer answer = http.post(path, request(outputs), bytes);
        return take(path, answer, [&] {
            std::vector<Tensor> tensors = read_outputs(answer);
            check_whole(tensors, described, outputs, batch);
            return tensors;
        });
    } catch (const Error&) {
        known_.erase({model_name, version});  // another version may be loaded: the next call asks again
        throw;
    }
}

TritonClient::TritonClient(std::string url, TritonOptions options)
    : impl_(guarded("Triton client", [&] { return std::make_unique<Impl>(std::move(url), options); })) {}
TritonClient::~TritonClient() = default;
TritonClient::TritonClient(TritonClient&&) noexcept = default;
TritonClient& TritonClient::operator=(TritonClient&&) noexcept = default;

TritonClient::Impl& TritonClient::impl() const {
    if (!impl_) {
        throw Error("this neck::TritonClient was moved from; use the client that it was moved to");
    }
    return *impl_;
}

const std::string& TritonClient::url() const { return impl().http.url(); }

TritonModel TritonClient::model(const std::string& name, const std::string& version) {
    Impl& client = impl();
    return guarded(client.http.url(), [&] { return client.model(name, version); });
}

std::vector<Tensor> TritonClient::infer(const std::string& model, const Tensor& input,
                                        const std::vector<std::string>& outputs, const std::string& version) {
    Impl& client = impl();
    return guarded(client.http.url(), [&] {
        input.check();
        const auto request = [&](const std::vector<std::string>& wanted) {
            return request_json(input.name, name_in(names, input.type), input.shape, input.data.size(), wanted);
        };
        const std::string_view bytes(reinterpret_cast<const char*>(input.data.data()), input.data.size());
        return client.infer(model, version, request, bytes, input.shape.empty() ? 1 : input.shape[0], outputs);
    });
}

std::vector<Tensor> TritonClient::infer_bytes(const std::string& model, const std::string& input,
                                              const std::vector<std::string_view>& elements,
                                              const std::vector<std::string>& outputs, const std::string& version) {
    Impl& client = impl();
    return guarded(client.http.url(), [&] {
        std::string bytes;
        for (const std::string_view element : elements) {
            if (element.size() > UINT32_MAX) {
                throw Error("an element of input " + input + " has " + std::to_string(element.size()) +
                            " bytes, but elements of type BYTES can have at most 4294967295; send a smaller file");
            }
            const auto length = static_cast<std::uint32_t>(element.size());
            bytes.append(reinterpret_cast<const char*>(&length), sizeof length);
            bytes += element;
        }
        const auto batch = static_cast<std::int64_t>(elements.size());
        const auto request = [&](const std::vector<std::string>& wanted) {
            return request_json(input, bytes_type, {batch, 1}, bytes.size(), wanted);
        };
        return client.infer(model, version, request, bytes, batch, outputs);
    });
}

}  // namespace neck
