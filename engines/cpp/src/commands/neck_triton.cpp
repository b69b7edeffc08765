#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <string_view>

#include "commands/command.hpp"
#include "files/files.hpp"
#include "neck/triton.hpp"
#include "files/text.hpp"

namespace {

using neck::Exit;

constexpr const char* help = R"(Usage: neck-triton URL [IMAGE] [options]

Sends an image to a model in Triton over HTTP, and prints the shapes of the outputs and the latency.

  URL                   address of Triton's HTTP port, such as localhost:8000
  IMAGE                 PNG or JPEG file of any size; it is resized to the model's input, or sent unchanged if the
                        model decodes image files itself
  --compare FILE        compare the outputs with a reference written by `neck-export verify --save-reference`;
                        without IMAGE, the images in the reference are sent
  --model NAME          name of the model in Triton [default: sam3-encoder]
  --model-version N     version of the model [default: the server chooses]
  --precision P         use the tolerances for fp32, fp16, bf16, fp8 or int8 [default: chosen by the type of the
                        outputs]
  --batch N             images per request; a single IMAGE is repeated [default: the number of images, up to the
                        model's largest batch]
  --runs N              number of timed requests [default: 20]
  --timeout MS          time limit for one request in milliseconds [default: 60000]
  --largest-answer MB   refuse answers that are longer than this many megabytes [default: 4295]
  --user NAME           user name for basic authentication; the password is read from NECK_TRITON_PASSWORD
  --header 'NAME: TEXT' send this HTTP header with every request; may be repeated
  --ca FILE             PEM file with the certificates to trust for https [default: SSL_CERT_FILE, or the system's]
  --help                show this text

A bearer token is read from NECK_TRITON_TOKEN. The URL may contain a user name and a password. Credentials are never
printed.

Exit codes: 0 success, 1 error, 2 wrong usage, 3 an output differs from the reference by more than the tolerance.
)";

constexpr std::int64_t default_runs = 20;

struct Arguments : neck::Asked {
    std::string model = "sam3-encoder";
    std::string version;
    std::string precision;
    neck::TritonOptions options;
};

Arguments parse(int count, char** values) {
    Arguments arguments;
    arguments.runs = default_runs;
    const auto take_precision = [&](const std::string& value) {
        if (value != "fp32" && value != "fp16" && value != "bf16" && value != "fp8" && value != "int8") {
            throw neck::UsageError{"--precision must be fp32, fp16, bf16, fp8 or int8, but " + neck::repr(value) +
                                   " was given"};
        }
        arguments.precision = value;
    };
    const auto take_version = [&](const std::string& value) {
        arguments.version = std::to_string(neck::parse_count("--model-version", value));
    };
    const auto take_timeout = [&](const std::string& value) {
        arguments.options.timeout = std::chrono::milliseconds(neck::parse_count("--timeout", value));
    };
    const auto take_largest = [&](const std::string& value) {
        arguments.options.largest_answer =
            static_cast<std::size_t>(neck::parse_count("--largest-answer", value)) * 1'000'000;
    };
    const auto take_header = [&](const std::string& value) {
        const std::size_t colon = value.find(':');
        if (colon == std::string::npos) {
            throw neck::UsageError{"--header must be a name, a colon and a value, such as 'X-Tenant: a'"};
        }
        const std::size_t text = std::min(value.find_first_not_of(' ', colon + 1), value.size());
        arguments.options.headers.emplace_back(value.substr(0, colon), value.substr(text));
    };
    const auto from_environment = [](const char* name) {
        const char* value = std::getenv(name);  // NOLINT(concurrency-mt-unsafe): before any thread
        return std::string(value != nullptr ? value : "");
    };
    arguments.options.token = from_environment("NECK_TRITON_TOKEN");
    neck::parse(count, values, arguments,
                {{"model", true, [&](const std::string& value) { arguments.model = value; }},
                 {"model-version", true, take_version},
                 {"precision", true, take_precision},
                 {"timeout", true, take_timeout},
                 {"largest-answer", true, take_largest},
                 {"user", true, [&](const std::string& value) { arguments.options.username = value; }},
                 {"header", true, take_header},
                 {"ca", true, [&](const std::string& value) { arguments.options.ca_file = value; }}});
    arguments.options.password = from_environment("NECK_TRITON_PASSWORD");
    if (!arguments.help && !arguments.image && !arguments.reference) {
        throw neck::UsageError{"pass URL and IMAGE, or URL and --compare FILE"};
    }
    return arguments;
}

/// The precision that the outputs' type tells; a model of FP16 that gives FP32 needs --precision.
std::string choose_precision(const Arguments& arguments, const std::vector<neck::Tensor>& outputs) {
    if (!arguments.precision.empty()) {
        return arguments.precision;
    }
    const neck::DataType type = outputs.empty() ? neck::DataType::float32 : outputs.front().type;
    return type == neck::DataType::float16 ? "fp16" : type == neck::DataType::bfloat16 ? "bf16" : "fp32";
}

/// Sends requests to the model and keeps how long each took.
class Sender {
public:
    Sender(neck::TritonClient& client, const Arguments& arguments) : client_(client), arguments_(arguments) {}

    std::vector<neck::Tensor> send(const neck::Tensor& part) {
        return timed([&] { return client_.infer(arguments_.model, part, {}, arguments_.version); });
    }

    std::vector<neck::Tensor> send(const std::string& input, const std::vector<std::string_view>& files) {
        return timed([&] { return client_.infer_bytes(arguments_.model, input, files, {}, arguments_.version); });
    }

    /// Prints the latency of `runs` more requests.
    template <typename Send>
    void measure(std::int64_t batch, Send send_one) {
        milliseconds_.clear();
        for (std::int64_t index = 0; index < arguments_.runs; ++index) {
            send_one();
        }
        neck::print_latencies("client's clock",
                              {{"one request, batch " + std::to_string(batch), neck::summarize(milliseconds_)}});
    }

private:
    template <typename Work>
    std::vector<neck::Tensor> timed(Work work) {
        const auto start = std::chrono::steady_clock::now();
        std::vector<neck::Tensor> outputs = work();
        const auto end = std::chrono::steady_clock::now();
        milliseconds_.push_back(std::chrono::duration<double, std::milli>(end - start).count());
        return outputs;
    }

    neck::TritonClient& client_;
    const Arguments& arguments_;
    std::vector<double> milliseconds_;
};

/// Prints the outputs, and their figures where there is a reference.
Exit print(const Arguments& arguments, const std::string& server, const neck::Batch& images,
           const std::vector<neck::Tensor>& outputs, const std::optional<neck::Reference>& reference) {
    std::cout << server << "\n";
    return neck::print_outputs(images, outputs, reference, choose_precision(arguments, outputs), server);
}

neck::FileBytes read_image_file(const std::string& path) {
    try {
        return neck::read_file(path);
    } catch (const std::system_error& error) {
        throw neck::Error(path + ": the file cannot be read (" + error.code().message() +
                          "); check the path and its permissions");
    }
}

/// Sends the file itself, as often as the batch says, to a model that decodes it.
Exit run_file(const Arguments& arguments, const neck::BytesPort& input, const std::string& server, Sender& sender,
              const std::optional<neck::Reference>& reference) {
    if (!arguments.image) {
        throw neck::Error("the model " + arguments.model +
                          " accepts only image files; pass the path of an image as IMAGE");
    }
    const neck::FileBytes file = read_image_file(*arguments.image);
    const auto batch = static_cast<std::size_t>(std::max<std::int64_t>(1, arguments.batch));
    const std::vector<std::string_view> files(batch, file.text());
    const std::vector<neck::Tensor> outputs = sender.send(input.name, files);
    neck::Batch sent;
    sent.image = neck::Tensor(input.name, neck::DataType::uint8, {static_cast<std::int64_t>(file.size())});
    const Exit code = print(arguments, server, sent, outputs, reference);
    if (code == Exit::done) {
        sender.measure(static_cast<std::int64_t>(batch), [&] { sender.send(input.name, files); });
    }
    return code;
}

Exit run(const Arguments& arguments) {
    if (arguments.help) {
        std::cout << help;
        return Exit::done;
    }
    const std::optional<neck::Reference> reference = neck::read_asked(arguments);
    neck::TritonClient client(arguments.target, arguments.options);
    const neck::TritonModel model = client.model(arguments.model, arguments.version);
    const std::string server = model.name + " in Triton at " + client.url() +
                               (model.platform.empty() ? "" : " (" + model.platform + ")");
    Sender sender(client, arguments);
    if (model.inputs.empty() && model.bytes_inputs.size() == 1) {
        return run_file(arguments, model.bytes_inputs[0], server, sender, reference);
    }
    if (model.inputs.size() != 1 || !model.bytes_inputs.empty()) {
        throw neck::Error("the model " + arguments.model + " has " +
                          std::to_string(model.inputs.size() + model.bytes_inputs.size()) +
                          " inputs, but must have exactly one, the image; choose another model with --model");
    }
    const neck::Port& input = model.inputs[0];
    const neck::Batch images = neck::choose_image(arguments, input, reference);
    const neck::Tensor& image = images.image;
    const auto send = [&](const neck::Tensor& part) { return sender.send(part); };
    const std::vector<neck::Tensor> outputs = neck::run_in_batches(image, input, arguments.batch, send);
    const Exit code = print(arguments, server, images, outputs, reference);
    if (code == Exit::done) {
        const neck::Tensor part = neck::first_batch(image, input, arguments.batch);
        sender.measure(part.shape[0], [&] { sender.send(part); });
    }
    return code;
}

}  // namespace

int main(int count, char** values) {
    return neck::run_command("neck-triton", help, [&] { return run(parse(count, values)); });
}
