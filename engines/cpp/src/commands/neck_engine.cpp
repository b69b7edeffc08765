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

Runs a TensorRT plan built by `neck-export trt` on the GPU. The manifest PLAN.json must be in the same folder.

  IMAGE               PNG or JPEG file of any size; it is resized to the plan's input
  --compare FILE      compare the outputs with a reference written by `neck-export verify --save-reference`; without
                      IMAGE, the plan runs on the images in the reference
  --batch N           batch size; a single IMAGE is repeated [default: the number of images, up to the plan's largest
                      batch; without images, its optimum]
  --runs N            number of timed runs [default: 200]
  --graph             run the plan as a CUDA graph
  --rtx-graph         let TensorRT-RTX capture CUDA graphs itself
  --startup           measure how long loading, the first run and the second run take. A second call reuses the
                      kernels that TensorRT-RTX compiled, from PLAN.cache
  --serve-folder IN OUT
                      compute the features of all images in the folder IN and write them to OUT/NAME.safetensors.
                      Existing features are kept unless they are damaged or their image has changed. For each
                      image that cannot be read, one line is printed to stderr and the exit code is 1
  --device N          index of the GPU in CUDA's numbering [default: 0]
  --manifest          check the plan's files and print what the manifest contains; needs no GPU
  --help              show this text

Exit codes: 0 success, 1 error, 2 wrong usage, 3 an output differs from the reference by more than the tolerance.
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
              << "batch                " << (manifest.batch.empty() ? "not recorded" : manifest.batch) << "\n"
              << "inputs               " << specs(manifest.inputs) << "\n"
              << "outputs              " << specs(manifest.outputs) << "\n"
              << "verification         " << manifest.verification << "\n"
              << "files                complete: "
              << neck::joined(manifest.files, [](const neck::Manifest::File& file) { return file.name; }) << "\n";
}

/// Times a piece of work on the stream between two CUDA events.
template <typename Work>
neck::Latency measure(cudaStream_t stream, std::int64_t runs, const std::string& plan, Work work) {
    const std::string failure =
        plan + ": the latency cannot be measured, because creating a CUDA event failed with the following CUDA error";
    const neck::OwnedEvent start = neck::make_event(failure, cudaEventDefault);
    const neck::OwnedEvent end = neck::make_event(failure, cudaEventDefault);
    std::vector<double> times;
    for (std::int64_t index = -warm_up_runs; index < runs; ++index) {
        neck::check(cudaEventRecord(start.get(), stream), plan + ": measuring the time with CUDA events failed");
        work();
        neck::check(cudaEventRecord(end.get(), stream), plan + ": measuring the time with CUDA events failed");
        neck::check(cudaEventSynchronize(end.get()), plan + ": CUDA reported an error while the GPU ran the plan");
        float elapsed = 0;
        neck::check(cudaEventElapsedTime(&elapsed, start.get(), end.get()),
                    plan + ": measuring the time with CUDA events failed");
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
    std::cout << engine.runtime()
              << (engine.warm() ? "; warm start with kernels from the runtime cache" : "; cold start") << "\n";
    lap("loading");
    const neck::DeviceGuard guard(arguments.device, arguments.target);
    const neck::OwnedStream stream = neck::make_stream(arguments.target + ": creating a CUDA stream failed");
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
            throw neck::UsageError{
                "--serve-folder needs PLAN, IN and OUT, and cannot be combined with --compare or --startup"};
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
    const neck::OwnedStream stream = neck::make_stream(plan + ": creating a CUDA stream failed");
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
    neck::print_latencies("CUDA events", {{std::string("inference ") + (arguments.graph ? "with" : "without") +
                                               " CUDA graph, batch " + std::to_string(batch),
                                           latency},
                                          {"inference with copies to and from GPU", whole}});
    std::cout << neck::format("loading the plan used %.1f MB of device memory\n",
                              static_cast<double>(engine.loaded_bytes()) / 1e6);
    return Exit::done;
}

}  // namespace

int main(int count, char** values) {
    return neck::run_command("neck-engine", help, [&] { return run(parse(count, values)); });
}
