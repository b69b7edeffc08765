#include "neck/triton.hpp"

#include <algorithm>
#include <utility>

#include "client/http.hpp"
#include "files/json.hpp"
#include "files/text.hpp"
#include "tensors/type_names.hpp"

namespace neck {
namespace {

constexpr TypeNames names{"FP32", "FP16", "BF16", "UINT8", "INT32", "INT64"};

Json parse(std::string_view text) {
    Json json = parse_json(text);
    if (!json.is_object()) {
        throw Fault{"is no JSON object"};
    }
    return json;
}

std::string name_of(const Json& object) {
    std::string name = text_or_empty(object, "name");
    if (name.empty() || !plain(name)) {
        throw Fault{"has the odd name " + repr(name)};
    }
    return name;
}

const Json& list_of(const Json& object, const char* key) {
    const auto found = object.find(key);
    if (found == object.end() || !found->is_array()) {
        throw Fault{"has no list " + repr(key)};
    }
    return *found;
}

DataType type_of(const Json& tensor) {
    const std::string text = text_or_empty(tensor, "datatype");
    const auto type = type_in(names, text);
    if (!type) {
        throw Fault{repr(text_or_empty(tensor, "name")) + " is of type " + repr(text) +
                    "; expected FP32, FP16, BF16, UINT8, INT32 or INT64"};
    }
    return *type;
}

Shape shape_of(const Json& tensor) {
    Shape shape;
    for (const Json& side : list_of(tensor, "shape")) {
        if (!side.is_number_integer()) {
            throw Fault{repr(text_or_empty(tensor, "name")) + " has a shape that is not of numbers"};
        }
        shape.push_back(side.get<std::int64_t>());
    }
    return shape;
}

std::vector<Port> read_ports(const Json& metadata, const char* key, std::int64_t largest_batch) {
    std::vector<Port> ports;
    for (const Json& tensor : list_of(metadata, key)) {
        if (!tensor.is_object()) {
            throw Fault{"has tensors that are no objects"};
        }
        Port port{name_of(tensor), type_of(tensor), shape_of(tensor)};
        if (port.shape.empty()) {
            throw Fault{"has a tensor without shape"};
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
    throw Fault{repr(text_or_empty(output, "name")) + " has no binary data"};
}

std::vector<Tensor> read_outputs(const Answer& answer) {
    if (answer.header_length == 0 || answer.header_length > answer.body.size()) {
        throw Fault{"does not say where its binary data begin (Inference-Header-Content-Length)"};
    }
    const Json json = parse(std::string_view(answer.body).substr(0, answer.header_length));
    std::string_view rest = std::string_view(answer.body).substr(answer.header_length);
    std::vector<Tensor> outputs;
    for (const Json& output : list_of(json, "outputs")) {
        if (!output.is_object()) {
            throw Fault{"has outputs that are no objects"};
        }
        Tensor tensor{name_of(output), type_of(output), shape_of(output), {}};
        const std::size_t size = binary_size(output);
        if (size != bytes_of(tensor.type, tensor.shape) || size > rest.size()) {
            throw Fault{repr(tensor.name) + " is " + tensor.describe() + ", but has " +
                        std::to_string(std::min(size, rest.size())) + " bytes"};
        }
        const auto* begin = reinterpret_cast<const std::byte*>(rest.data());
        tensor.data.assign(begin, begin + size);
        rest.remove_prefix(size);
        outputs.push_back(std::move(tensor));
    }
    if (!rest.empty()) {
        throw Fault{"has " + std::to_string(rest.size()) + " bytes more than its outputs"};
    }
    return outputs;
}

/// The server's own words where it gives some.
std::string server_error(const Answer& answer) {
    const std::string told = text_or_empty(parse_json(answer.body), "error");
    return one_line(told.empty() ? std::string_view(answer.body).substr(0, 400) : std::string_view(told));
}

std::string request_json(const Tensor& input, const std::vector<std::string>& outputs) {
    Json request;
    request["inputs"] = Json::array({{{"name", input.name},
                                      {"datatype", name_in(names, input.type)},
                                      {"shape", input.shape},
                                      {"parameters", {{"binary_data_size", input.data.size()}}}}});
    if (outputs.empty()) {
        request["parameters"]["binary_data_output"] = true;
    }
    for (const std::string& name : outputs) {
        request["outputs"].push_back({{"name", name}, {"parameters", {{"binary_data", true}}}});
    }
    return dump_json(request);
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
            throw Error(address + ": the server refuses (HTTP " + std::to_string(answer.status) +
                        "): " + server_error(answer));
        }
        constexpr const char* hint = "; is it Triton with its binary tensor extension?";
        try {
            return use();
        } catch (const Fault& fault) {
            throw Error(address + ": the answer " + one_line(fault.why) + hint);
        } catch (const Json::exception& error) {
            throw Error(address + ": the answer cannot be read (" + one_line(error.what()) + ")" + hint);
        } catch (const Error& error) {
            throw Error(address + ": the answer cannot be read (" + one_line(error.what()) + ")" + hint);
        }
    }

    Http http;
};

TritonClient::TritonClient(std::string url, TritonOptions options)
    : impl_(std::make_unique<Impl>(std::move(url), options)) {}
TritonClient::~TritonClient() = default;
TritonClient::TritonClient(TritonClient&&) noexcept = default;
TritonClient& TritonClient::operator=(TritonClient&&) noexcept = default;

TritonModel TritonClient::model(const std::string& name, const std::string& version) {
    const std::string path = impl_->path_of(name, version);
    const Answer config = impl_->http.get(path + "/config");
    const std::int64_t largest = impl_->take(path + "/config", config, [&] {
        const Json json = parse(config.body);
        const auto found = json.find("max_batch_size");
        return found != json.end() && found->is_number_integer() ? std::max<std::int64_t>(1, found->get<std::int64_t>())
                                                                 : 1;
    });
    const Answer answer = impl_->http.get(path);
    return impl_->take(path, answer, [&] {
        const Json json = parse(answer.body);
        TritonModel model{name_of(json), {}, one_line(text_or_empty(json, "platform")), {}, {}};
        model.inputs = read_ports(json, "inputs", largest);
        model.outputs = read_ports(json, "outputs", largest);
        if (json.contains("versions")) {
            for (const Json& each : list_of(json, "versions")) {
                model.versions.push_back(each.is_string() ? each.get<std::string>() : "?");
            }
        }
        return model;
    });
}

std::vector<Tensor> TritonClient::infer(const std::string& model, const Tensor& input,
                                        const std::vector<std::string>& outputs, const std::string& version) {
    if (input.data.size() != bytes_of(input.type, input.shape)) {
        throw Error("input " + input.name + " is " + input.describe() + ", but has " +
                    std::to_string(input.data.size()) + " bytes");
    }
    const std::string path = impl_->path_of(model, version) + "/infer";
    const Answer answer = impl_->http.post(path, request_json(input, outputs), input.data);
    return impl_->take(path, answer, [&] { return read_outputs(answer); });
}

}  // namespace neck
