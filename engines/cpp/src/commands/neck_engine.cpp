#include <algorithm>
#include <chrono>
#include <iostream>
#include <optional>
#include <thread>

#include "commands/command.hpp"
#include "gpu/cuda.hpp"
#include "neck/engine.hpp"
#include "commands/serve_folder.hpp"
#include "files/text.hpp"

namespace {

using neck::Exit;

constexpr const char* help = R"(Usage: neck-engine PLAN [IMAGE] [options]

Runs a plan of `neck-export trt`, its manifest PLAN.json beside it, on the GPU.

  IMAGE             PNG or JPEG, resized to what the plan takes
  --compare FILE      check the outputs against a reference of `neck-export verify --save-reference`;
                      without IMAGE its own images are run
  --batch N           batch size; by default the number of images, or the plan's optimum without any
  --runs N            timed runs (default 200)
  --graph             run by a CUDA graph
  --rtx-graph         let TensorRT-RTX capture CUDA graphs of its own
  --startup           time the start: loading, first and second run. A second call finds TensorRT-RTX's kernels in
                      PLAN.cache and starts warm
  --serve-folder IN OUT
                      compute the features of IN's images: OUT/NAME.safetensors each. Features that are there are
                      kept unless they are damaged or the image has changed. Each image that cannot be read
                      gives one line on stderr, and the exit code 1
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
    bool rtx_graph = false;
    bool startup = false;
    std::optional<std::string> folder;
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
                 {"rtx-graph", false, [&](const std::string&) { arguments.rtx_graph = true; }},
                 {"serve-folder", true, [&](const std::string& value) { arguments.folder = value; }},
                 {"startup", false, [&](const std::string&) { arguments.startup = true; }},
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
    return neck::summarize(std::move(times));
}

/// What a process waits for before it serves: loading, then the first run.
Exit print_startup(const Arguments& arguments, const neck::EngineOptions& options) {
    const auto start = std::chrono::steady_clock::now();
    double before = 0;
    const auto lap = [&](const std::string& what) {
        const double now = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
        std::cout << neck::format("%-38s %10.1f ms\n", what.c_str(), now - before);
        before = now;
    };
    neck::Engine engine(arguments.target, options);
    std::cout << engine.runtime() << (engine.warm() ? ", warm: kernels of an earlier start" : ", cold") << "\n";
    lap("loading");
    const neck::DeviceGuard guard(arguments.device, arguments.target);
    const neck::OwnedStream stream = neck::make_stream(arguments.target);
    const neck::Tensor image = neck::choose_image(arguments, engine.input(), std::nullopt).image;
    const neck::Tensor part = neck::first_batch(image, engine.input(), arguments.batch);
    before = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    engine.infer(part, stream.get());
    lap("first run, batch " + std::to_string(part.shape[0]));
    engine.infer(part, stream.get());
    lap("second run");
    return Exit::done;
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
    options.rtx_graphs = arguments.rtx_graph;
    if (arguments.folder) {
        if (!arguments.image || arguments.reference || arguments.startup) {
            throw neck::UsageError{"expected PLAN --serve-folder IN OUT, without --compare and --startup"};
        }
        neck::FolderOptions folder;
        folder.batch = arguments.batch;
        folder.threads = static_cast<int>(std::max(2U, std::thread::hardware_concurrency()));
        return neck::serve_folder(plan, *arguments.folder, *arguments.image, options, folder);
    }
    if (arguments.startup) {
        return print_startup(arguments, options);
    }
    neck::Engine engine(plan, options);
    const neck::DeviceGuard guard(arguments.device, plan);
    const neck::OwnedStream stream = neck::make_stream(plan);
    const neck::Batch images = neck::choose_image(arguments, engine.input(), reference);
    const neck::Tensor& image = images.image;
    const std::vector<neck::Tensor> outputs =
        neck::run_in_batches(image, engine.input(), arguments.batch,
                             [&](const neck::Tensor& part) { return engine.infer(part, stream.get()); });
    const std::string& precision = engine.manifest().precision;
    std::cout << plan << ": " << precision << ", " << engine.runtime() << "\n";
    const Exit code = neck::print_outputs(images, outputs, reference, precision, engine.runtime());
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
