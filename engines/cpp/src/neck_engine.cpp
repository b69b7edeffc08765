#include <getopt.h>

#include <algorithm>
#include <array>
#include <iostream>
#include <optional>

#include "command.hpp"
#include "cuda.hpp"
#include "neck/engine.hpp"
#include "neck/fidelity.hpp"
#include "neck/npz.hpp"
#include "neck/picture.hpp"
#include "text.hpp"

namespace {

using neck::Exit;

constexpr const char* help = R"(Usage: neck-engine PLAN [PICTURE] [options]

Runs a plan of `neck-export trt`, its manifest PLAN.json beside it, on the GPU.

  PICTURE             PNG or JPEG of the plan's size
  --compare FILE.npz  check the outputs against a reference of `neck-export verify --save-reference`;
                      without PICTURE its own pictures are run
  --batch N           batch size; by default the number of pictures, or the plan's optimum without any
  --runs N            timed runs (default 200)
  --graph             run by a CUDA graph
  --device N          CUDA's number of the GPU (default 0)
  --manifest          check the files and print what the manifest says; needs no GPU
  --help              this text

Exit codes: 0 done, 1 an error, 2 usage, 3 outputs that leave the plan's tolerance.
)";

constexpr int warm_up_runs = 10;
constexpr std::int64_t default_runs = 200;

struct Arguments {
    std::string plan;
    std::optional<std::string> picture;
    std::optional<std::string> reference;
    std::int64_t batch = 0;
    std::int64_t runs = default_runs;
    int device = 0;
    bool graph = false;
    bool manifest = false;
    bool help = false;
};

void take_option(Arguments& arguments, int option) {
    const std::string value = optarg != nullptr ? optarg : "";
    switch (option) {
        case 'c':
            arguments.reference = value;
            break;
        case 'b':
            arguments.batch = neck::parse_count("--batch", value);
            break;
        case 'r':
            arguments.runs = neck::parse_count("--runs", value);
            break;
        case 'd':
            arguments.device = value == "0" ? 0 : static_cast<int>(neck::parse_count("--device", value));
            break;
        case 'g':
            arguments.graph = true;
            break;
        case 'm':
            arguments.manifest = true;
            break;
        case 'h':
            arguments.help = true;
            break;
        default:
            throw neck::UsageError{"an option that is not known, or lacks its value"};
    }
}

Arguments parse(int count, char** values) {
    constexpr std::array<option, 8> options{{{"compare", required_argument, nullptr, 'c'},
                                             {"batch", required_argument, nullptr, 'b'},
                                             {"runs", required_argument, nullptr, 'r'},
                                             {"device", required_argument, nullptr, 'd'},
                                             {"graph", no_argument, nullptr, 'g'},
                                             {"manifest", no_argument, nullptr, 'm'},
                                             {"help", no_argument, nullptr, 'h'},
                                             {nullptr, 0, nullptr, 0}}};
    Arguments arguments;
    const std::vector<std::string> rest =
        neck::parse_options(count, values, options.data(), [&](int option) { take_option(arguments, option); });
    if (arguments.help) {
        return arguments;
    }
    if (rest.empty() || rest.size() > 2) {
        throw neck::UsageError{"expected PLAN and at most one PICTURE"};
    }
    arguments.plan = rest[0];
    if (rest.size() == 2) {
        arguments.picture = rest[1];
    }
    return arguments;
}

void print_manifest(const neck::Manifest& manifest) {
    const auto specs = [](const std::vector<neck::Manifest::Spec>& list) {
        return neck::joined(list, [](const auto& spec) {
            std::string text = spec.name + " " + spec.dtype + " " + neck::to_text(spec.shape);
            return text;
        });
    };
    const std::string capabilities =
        neck::joined(manifest.compute_capabilities, [](const std::string& each) { return each; });
    std::cout << "manifest             " << manifest.path.string() << "\n"
              << "TensorRT             " << manifest.flavor << " " << manifest.tensorrt_version << "\n"
              << "compute capability   " << (capabilities.empty() ? "8.0 or later" : capabilities) << "\n"
              << "precision            " << manifest.precision << "\n"
              << "batch                " << (manifest.batch.empty() ? "not told" : manifest.batch) << "\n"
              << "inputs               " << specs(manifest.inputs) << "\n"
              << "outputs              " << specs(manifest.outputs) << "\n"
              << "verification         " << manifest.verification << "\n"
              << "files                whole: "
              << neck::joined(manifest.files, [](const neck::Manifest::File& file) { return file.name; }) << "\n";
}

/// Times a piece of work on the stream between two CUDA events.
template <typename Work>
neck::Latency measure(cudaStream_t stream, std::int64_t runs, const std::string& plan, Work work) {
    const neck::OwnedEvent start = neck::make_event(plan, cudaEventDefault);
    const neck::OwnedEvent end = neck::make_event(plan, cudaEventDefault);
    std::vector<double> times;
    for (std::int64_t index = -warm_up_runs; index < runs; ++index) {
        neck::check(cudaEventRecord(start.get(), stream), plan + ": timing");
        work();
        neck::check(cudaEventRecord(end.get(), stream), plan + ": timing");
        neck::check(cudaEventSynchronize(end.get()), plan + ": the run");
        float elapsed = 0;
        neck::check(cudaEventElapsedTime(&elapsed, start.get(), end.get()), plan + ": timing");
        if (index >= 0) {
            times.push_back(elapsed);
        }
    }
    return neck::summarise(std::move(times));
}

/// The pictures to run, uint8 (B, H, W, 3): the file's, the reference's, or grey ones.
neck::Tensor choose_pixels(const Arguments& arguments, const neck::Port& input,
                           const std::optional<neck::Reference>& reference) {
    const neck::Size size = neck::picture_size(input);
    if (arguments.picture) {
        const neck::Tensor pixels = neck::read_picture(*arguments.picture, size);
        return neck::repeat(pixels, arguments.batch > 0 ? arguments.batch : input.smallest_batch);
    }
    if (reference) {
        return reference->pixels;
    }
    const std::int64_t batch = arguments.batch > 0 ? arguments.batch : input.optimum_batch;
    neck::Tensor grey{"pixels", neck::DataType::uint8, {batch, size.height, size.width, 3}, {}};
    grey.data.assign(neck::bytes_of(grey.type, grey.shape), std::byte{128});
    return grey;
}

Exit run(const Arguments& arguments) {
    if (arguments.help) {
        std::cout << help;
        return Exit::done;
    }
    if (arguments.manifest) {
        print_manifest(neck::read_manifest(arguments.plan));
        return Exit::done;
    }
    std::optional<neck::Reference> reference;
    if (arguments.reference) {
        reference = neck::read_reference(*arguments.reference);
    }
    neck::EngineOptions options;
    options.device = arguments.device;
    options.cuda_graph = arguments.graph;
    neck::Engine engine(arguments.plan, options);
    for (const std::string& warning : engine.warnings()) {
        std::cerr << "neck-engine: TensorRT warns: " << warning << "\n";
    }
    const neck::DeviceGuard guard(arguments.device, arguments.plan);
    const neck::OwnedStream stream = neck::make_stream(arguments.plan);
    const neck::Tensor pixels = choose_pixels(arguments, engine.input(), reference);
    const neck::Tensor image = neck::prepare(pixels, engine.input());
    const std::vector<neck::Tensor> outputs =
        neck::run_in_batches(image, engine.input(), arguments.batch,
                             [&](const neck::Tensor& part) { return engine.infer(part, stream.get()); });
    std::cout << arguments.plan << ": " << engine.manifest().precision << ", " << engine.runtime() << "\n"
              << neck::format("%-20s ", image.name.c_str()) << image.describe() << "\n";
    neck::print_shapes(outputs);
    const Exit code = reference
                          ? neck::print_comparison(*reference, outputs, engine.manifest().precision, engine.runtime())
                          : Exit::done;
    if (code != Exit::done) {
        return code;
    }
    const std::int64_t asked = arguments.batch > 0 ? arguments.batch : engine.input().largest_batch;
    const std::int64_t batch = std::min(image.shape[0], asked);
    const neck::Latency latency =
        measure(stream.get(), arguments.runs, arguments.plan, [&] { engine.enqueue(batch, stream.get()); });
    const neck::Tensor part = image.slice(0, batch);
    const neck::Latency whole = measure(stream.get(), std::min<std::int64_t>(arguments.runs, 20), arguments.plan,
                                        [&] { engine.infer(part, stream.get()); });
    neck::print_latencies(
        "CUDA events", {{std::string("a run, ") + (arguments.graph ? "CUDA graph" : "kernel by kernel") + ", batch " +
                             std::to_string(batch),
                         latency},
                        {"copy in, run, copy out", whole}});
    std::cout << neck::format("device memory: loading took %.1f MB\n",
                              static_cast<double>(engine.loaded_bytes()) / 1e6);
    return Exit::done;
}

}  // namespace

int main(int count, char** values) {
    return neck::run_command("neck-engine", help, [&] { return run(parse(count, values)); });
}
