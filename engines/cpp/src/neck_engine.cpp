#include <algorithm>
#include <iostream>
#include <optional>

#include "command.hpp"
#include "cuda.hpp"
#include "neck/engine.hpp"
#include "text.hpp"

namespace {

using neck::Exit;

constexpr const char* help = R"(Usage: neck-engine PLAN [PICTURE] [options]

Runs a plan of `neck-export trt`, its manifest PLAN.json beside it, on the GPU.

  PICTURE             PNG or JPEG, resized to what the plan takes
  --compare FILE      check the outputs against a reference of `neck-export verify --save-reference`;
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

struct Arguments : neck::Asked {
    int device = 0;
    bool graph = false;
    bool manifest = false;
};

Arguments parse(int count, char** values) {
    Arguments arguments;
    arguments.runs = default_runs;
    const auto take_device = [&](const std::string& value) {
        arguments.device = value == "0" ? 0 : static_cast<int>(neck::parse_count("--device", value));
    };
    neck::parse(count, values, arguments,
                {{"device", true, take_device},
                 {"graph", false, [&](const std::string&) { arguments.graph = true; }},
                 {"manifest", false, [&](const std::string&) { arguments.manifest = true; }}});
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

Exit run(const Arguments& arguments) {
    if (arguments.help) {
        std::cout << help;
        return Exit::done;
    }
    const std::string& plan = arguments.target;
    if (arguments.manifest) {
        print_manifest(neck::read_manifest(plan));
        return Exit::done;
    }
    const std::optional<neck::Reference> reference = neck::read_asked(arguments);
    neck::EngineOptions options;
    options.device = arguments.device;
    options.cuda_graph = arguments.graph;
    neck::Engine engine(plan, options);
    for (const std::string& warning : engine.warnings()) {
        std::cerr << "neck-engine: TensorRT warns: " << warning << "\n";
    }
    const neck::DeviceGuard guard(arguments.device, plan);
    const neck::OwnedStream stream = neck::make_stream(plan);
    const neck::Batch pictures = neck::choose_image(arguments, engine.input(), reference);
    const neck::Tensor& image = pictures.image;
    const std::vector<neck::Tensor> outputs =
        neck::run_in_batches(image, engine.input(), arguments.batch,
                             [&](const neck::Tensor& part) { return engine.infer(part, stream.get()); });
    const std::string& precision = engine.manifest().precision;
    std::cout << plan << ": " << precision << ", " << engine.runtime() << "\n";
    const Exit code = neck::print_outputs(pictures, outputs, reference, precision, engine.runtime());
    if (code != Exit::done) {
        return code;
    }
    const neck::Tensor part = neck::first_batch(image, engine.input(), arguments.batch);
    const std::int64_t batch = part.shape[0];
    const neck::Latency latency =
        measure(stream.get(), arguments.runs, plan, [&] { engine.enqueue(batch, stream.get()); });
    const neck::Latency whole = measure(stream.get(), std::min<std::int64_t>(arguments.runs, 20), plan,
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
