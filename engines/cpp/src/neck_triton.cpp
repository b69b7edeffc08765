#include <getopt.h>

#include <array>
#include <chrono>
#include <iostream>
#include <optional>

#include "command.hpp"
#include "neck/npz.hpp"
#include "neck/picture.hpp"
#include "neck/triton.hpp"
#include "text.hpp"

namespace {

using neck::Exit;

constexpr const char* help = R"(Usage: neck-triton URL [PICTURE] [options]

Sends a picture to a model in Triton over HTTP and prints its features' shapes and the latency.

  URL                   such as localhost:8000
  PICTURE               PNG or JPEG of the model's size
  --compare FILE.npz    check the outputs against a reference of `neck-export verify --save-reference`;
                        without PICTURE its own pictures are sent
  --model NAME          (default sam3-encoder)
  --model-version N     by default the server chooses
  --precision P         fp32, fp16 or bf16: whose tolerances; by default told by the outputs' type
  --batch N             pictures in one request
  --runs N              timed requests (default 20)
  --timeout MS          of one request (default 60000)
  --help                this text

Exit codes: 0 done, 1 an error, 2 usage, 3 outputs that leave tolerance.
)";

struct Arguments {
    std::string url;
    std::optional<std::string> picture;
    std::optional<std::string> reference;
    std::string model = "sam3-encoder";
    std::string version;
    std::string precision;
    std::int64_t batch = 0;
    std::int64_t runs = 20;
    neck::TritonOptions options;
    bool help = false;
};

void take_option(Arguments& arguments, int option) {
    const std::string value = optarg != nullptr ? optarg : "";
    switch (option) {
        case 'c':
            arguments.reference = value;
            break;
        case 'm':
            arguments.model = value;
            break;
        case 'v':
            arguments.version = std::to_string(neck::parse_count("--model-version", value));
            break;
        case 'p':
            if (value != "fp32" && value != "fp16" && value != "bf16") {
                throw neck::UsageError{"--precision " + neck::repr(value) + ": expected fp32, fp16 or bf16"};
            }
            arguments.precision = value;
            break;
        case 'b':
            arguments.batch = neck::parse_count("--batch", value);
            break;
        case 'r':
            arguments.runs = neck::parse_count("--runs", value);
            break;
        case 't':
            arguments.options.timeout = std::chrono::milliseconds(neck::parse_count("--timeout", value));
            break;
        case 'h':
            arguments.help = true;
            break;
        default:
            throw neck::UsageError{"an option that is not known, or lacks its value"};
    }
}

Arguments parse(int count, char** values) {
    constexpr std::array<option, 9> options{{{"compare", required_argument, nullptr, 'c'},
                                             {"model", required_argument, nullptr, 'm'},
                                             {"model-version", required_argument, nullptr, 'v'},
                                             {"precision", required_argument, nullptr, 'p'},
                                             {"batch", required_argument, nullptr, 'b'},
                                             {"runs", required_argument, nullptr, 'r'},
                                             {"timeout", required_argument, nullptr, 't'},
                                             {"help", no_argument, nullptr, 'h'},
                                             {nullptr, 0, nullptr, 0}}};
    Arguments arguments;
    const std::vector<std::string> rest =
        neck::parse_options(count, values, options.data(), [&](int option) { take_option(arguments, option); });
    if (arguments.help) {
        return arguments;
    }
    if (rest.empty() || rest.size() > 2 || (rest.size() == 1 && !arguments.reference)) {
        throw neck::UsageError{"expected URL and PICTURE, or URL and --compare"};
    }
    arguments.url = rest[0];
    if (rest.size() == 2) {
        arguments.picture = rest[1];
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

Exit run(const Arguments& arguments) {
    if (arguments.help) {
        std::cout << help;
        return Exit::done;
    }
    std::optional<neck::Reference> reference;
    if (arguments.reference) {
        reference = neck::read_reference(*arguments.reference);
    }
    neck::TritonClient client(arguments.url, arguments.options);
    const neck::TritonModel model = client.model(arguments.model, arguments.version);
    if (model.inputs.size() != 1) {
        throw neck::Error(arguments.model + " takes " + std::to_string(model.inputs.size()) +
                          " inputs; expected one, a picture");
    }
    const neck::Port& input = model.inputs[0];
    const neck::Tensor pixels = arguments.picture
                                    ? neck::repeat(neck::read_picture(*arguments.picture, neck::picture_size(input)),
                                                   arguments.batch > 0 ? arguments.batch : input.smallest_batch)
                                    : reference->pixels;
    const neck::Tensor image = neck::prepare(pixels, input);
    std::vector<double> milliseconds;
    const auto send = [&](const neck::Tensor& part) {
        const auto start = std::chrono::steady_clock::now();
        std::vector<neck::Tensor> outputs = client.infer(arguments.model, part, {}, arguments.version);
        milliseconds.push_back(
            std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
        return outputs;
    };
    const std::vector<neck::Tensor> outputs = neck::run_in_batches(image, input, arguments.batch, send);
    const std::string server = model.name + " in Triton at " + arguments.url;
    std::cout << server << (model.platform.empty() ? "" : " (" + model.platform + ")") << "\n"
              << neck::format("%-20s ", image.name.c_str()) << image.describe() << "\n";
    neck::print_shapes(outputs);
    if (reference) {
        const Exit code = neck::print_comparison(*reference, outputs, choose_precision(arguments, outputs), server);
        if (code != Exit::done) {
            return code;
        }
    }
    const std::int64_t asked = arguments.batch > 0 ? arguments.batch : input.largest_batch;
    const neck::Tensor part = image.slice(0, std::min(image.shape[0], asked));
    milliseconds.clear();
    for (std::int64_t index = 0; index < arguments.runs; ++index) {
        send(part);
    }
    neck::print_latencies("this client's clock",
                          {{"a request, batch " + std::to_string(part.shape[0]), neck::summarise(milliseconds)}});
    return Exit::done;
}

}  // namespace

int main(int count, char** values) {
    return neck::run_command("neck-triton", help, [&] { return run(parse(count, values)); });
}
