#include <chrono>
#include <iostream>
#include <optional>

#include "commands/command.hpp"
#include "neck/triton.hpp"
#include "files/text.hpp"

namespace {

using neck::Exit;

constexpr const char* help = R"(Usage: neck-triton URL [PICTURE] [options]

Sends a picture to a model in Triton over HTTP and prints its features' shapes and the latency.

  URL                   such as localhost:8000
  PICTURE               PNG or JPEG, resized to what the model takes
  --compare FILE        check the outputs against a reference of `neck-export verify --save-reference`;
                        without PICTURE its own pictures are sent
  --model NAME          (default sam3-encoder)
  --model-version N     by default the server chooses
  --precision P         fp32, fp16, bf16, fp8 or int8: whose tolerances; by default told by the outputs' type
  --batch N             pictures in one request
  --runs N              timed requests (default 20)
  --timeout MS          of one request (default 60000)
  --help                this text

Exit codes: 0 done, 1 an error, 2 usage, 3 outputs that leave tolerance.
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
            throw neck::UsageError{"--precision " + neck::repr(value) + ": expected fp32, fp16, bf16, fp8 or int8"};
        }
        arguments.precision = value;
    };
    const auto take_version = [&](const std::string& value) {
        arguments.version = std::to_string(neck::parse_count("--model-version", value));
    };
    const auto take_timeout = [&](const std::string& value) {
        arguments.options.timeout = std::chrono::milliseconds(neck::parse_count("--timeout", value));
    };
    neck::parse(count, values, arguments,
                {{"model", true, [&](const std::string& value) { arguments.model = value; }},
                 {"model-version", true, take_version},
                 {"precision", true, take_precision},
                 {"timeout", true, take_timeout}});
    if (!arguments.help && !arguments.picture && !arguments.reference) {
        throw neck::UsageError{"expected URL and PICTURE, or URL and --compare"};
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
    const std::optional<neck::Reference> reference = neck::read_asked(arguments);
    neck::TritonClient client(arguments.target, arguments.options);
    const neck::TritonModel model = client.model(arguments.model, arguments.version);
    if (model.inputs.size() != 1) {
        throw neck::Error(arguments.model + " takes " + std::to_string(model.inputs.size()) +
                          " inputs; expected one, a picture");
    }
    const neck::Port& input = model.inputs[0];
    const neck::Batch pictures = neck::choose_image(arguments, input, reference);
    const neck::Tensor& image = pictures.image;
    std::vector<double> milliseconds;
    const auto send = [&](const neck::Tensor& part) {
        const auto start = std::chrono::steady_clock::now();
        std::vector<neck::Tensor> outputs = client.infer(arguments.model, part, {}, arguments.version);
        milliseconds.push_back(
            std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
        return outputs;
    };
    const std::vector<neck::Tensor> outputs = neck::run_in_batches(image, input, arguments.batch, send);
    const std::string server = model.name + " in Triton at " + arguments.target;
    std::cout << server << (model.platform.empty() ? "" : " (" + model.platform + ")") << "\n";
    const Exit code = neck::print_outputs(pictures, outputs, reference, choose_precision(arguments, outputs), server);
    if (code != Exit::done) {
        return code;
    }
    const neck::Tensor part = neck::first_batch(image, input, arguments.batch);
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
