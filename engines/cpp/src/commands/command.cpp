#include "commands/command.hpp"

#include <fcntl.h>
#include <getopt.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <csignal>
#include <iostream>
#include <numeric>
#include <thread>

#include "neck/error.hpp"
#include "neck/fidelity.hpp"
#include "neck/log.hpp"
#include "files/text.hpp"

namespace neck {
namespace {

double percentile(const std::vector<double>& sorted, double share) {
    const double place = share * static_cast<double>(sorted.size() - 1);
    const auto below = static_cast<std::size_t>(place);
    const std::size_t above = std::min(below + 1, sorted.size() - 1);
    return sorted[below] + (sorted[above] - sorted[below]) * (place - static_cast<double>(below));
}

void append(std::vector<Tensor>& joined, std::vector<Tensor>&& part) {
    if (joined.empty()) {
        joined = std::move(part);
        return;
    }
    for (std::size_t index = 0; index < joined.size(); ++index) {
        joined[index].shape.at(0) += part.at(index).shape.at(0);
        joined[index].data.insert(joined[index].data.end(), part[index].data.begin(), part[index].data.end());
    }
}

/// Gives closed standard streams to /dev/null, lest the next file or socket that is opened takes their number.
/// \return whether standard output was open.
bool fill_descriptors() {
    bool open_out = true;
    for (const int number : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
        if (fcntl(number, F_GETFD) == -1) {
            open_out = open_out && number != STDOUT_FILENO;
            if (open("/dev/null", O_RDWR) != number) {  // NOLINT: it stays open
                return false;
            }
        }
    }
    return open_out;
}

Exit print_usage(const std::string& help, const std::string& why) {
    std::cerr << why << "\n" << help;
    return Exit::usage;
}

}  // namespace

std::int64_t parse_count(const std::string& option, const std::string& text) {
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < 1 || value > 1'000'000) {
        throw UsageError{option + " must be a whole number from 1 to 1000000, but " + repr(text) + " was given"};
    }
    return value;
}

void parse(int count, char** values, Asked& asked, const std::vector<Option>& options) {
    std::vector<Option> known{
        {"compare", true, [&](const std::string& value) { asked.reference = value; }},
        {"batch", true, [&](const std::string& value) { asked.batch = parse_count("--batch", value); }},
        {"runs", true, [&](const std::string& value) { asked.runs = parse_count("--runs", value); }},
        {"help", false, [&](const std::string&) { asked.help = true; }}};
    known.insert(known.end(), options.begin(), options.end());
    std::vector<option> rows;
    rows.reserve(known.size() + 1);
    for (const Option& each : known) {
        rows.push_back({each.name, each.has_value ? required_argument : no_argument, nullptr, 0});
    }
    rows.push_back({nullptr, 0, nullptr, 0});
    opterr = 0;
    int found = 0;
    for (int code = 0; (code = getopt_long(count, values, "", rows.data(), &found)) != -1;) {
        if (code != 0) {
            const std::string given = optopt != 0 ? std::string("-") + static_cast<char>(optopt) : values[optind - 1];
            throw UsageError{"the option " + repr(given) + " is unknown, or its value is missing or not allowed; see "
                             "the usage below"};
        }
        known[static_cast<std::size_t>(found)].take(optarg != nullptr ? optarg : "");
    }
    const std::vector<std::string> rest(values + optind, values + count);
    if (!asked.help && (rest.empty() || rest.size() > 2)) {
        throw UsageError{"pass exactly one plan or server URL, and at most one IMAGE"};
    }
    asked.target = rest.empty() ? "" : rest[0];
    if (rest.size() == 2) {
        asked.image = rest[1];
    }
}

Latency summarize(std::vector<double> milliseconds) {
    if (milliseconds.empty()) {
        return {};
    }
    std::sort(milliseconds.begin(), milliseconds.end());
    const double sum = std::accumulate(milliseconds.begin(), milliseconds.end(), 0.0);
    return {sum / static_cast<double>(milliseconds.size()),
            percentile(milliseconds, 0.5),
            percentile(milliseconds, 0.9),
            percentile(milliseconds, 0.95),
            percentile(milliseconds, 0.99),
            milliseconds.size()};
}

void print_latencies(const std::string& clock, const std::vector<std::pair<std::string, Latency>>& rows) {
    std::cout << format("%-38s %8s %8s %8s %8s %8s %5s\n", ("latency in ms (" + clock + ")").c_str(), "p50", "p90",
                        "p95", "p99", "mean", "runs");
    for (const auto& [name, row] : rows) {
        std::cout << format("%-38s %8.3f %8.3f %8.3f %8.3f %8.3f %5zu\n", name.c_str(), row.p50, row.p90, row.p95,
                            row.p99, row.mean, row.runs);
    }
}

std::optional<Reference> read_asked(const Asked& asked) {
    return asked.reference ? std::optional(read_reference(*asked.reference)) : std::nullopt;
}

Batch choose_image(const Asked& asked, const Port& input, const std::optional<Reference>& reference) {
    const Preprocessor preprocessor(input, static_cast<int>(std::thread::hardware_concurrency()));
    const Size size = preprocessor.size();
    if (asked.image) {
        Batch batch = preprocessor.read({*asked.image});
        batch.image = repeat(batch.image, asked.batch > 0 ? asked.batch : input.smallest_batch);
        return batch;
    }
    if (reference) {
        const Tensor& pixels = reference->pixels;
        if (pixels.shape[1] != size.height || pixels.shape[2] != size.width) {
            throw Error("the images in the reference are " + pixels.describe() + ", but the model needs " +
                        std::to_string(size.height) + " x " + std::to_string(size.width) +
                        " pixels (height x width); write a reference for this model with `neck-export verify "
                        "--save-reference`");
        }
        return {preprocessor.prepare(pixels).image, {}};
    }
    const std::int64_t batch = asked.batch > 0 ? asked.batch : input.optimum_batch;
    Tensor gray{"pixels", DataType::uint8, {batch, size.height, size.width, 3}};
    std::fill(gray.data.begin(), gray.data.end(), std::byte{128});
    return {preprocessor.prepare(gray).image, {}};
}

std::vector<Tensor> run_in_batches(const Tensor& image, const Port& input, std::int64_t asked,
                                   const std::function<std::vector<Tensor>(const Tensor&)>& run) {
    const std::int64_t count = image.shape.at(0);
    const std::int64_t batch = asked > 0 ? asked : std::min(count, input.largest_batch);
    const std::int64_t rest = count % std::max<std::int64_t>(1, batch);
    if (batch < input.smallest_batch || batch > input.largest_batch || (rest > 0 && rest < input.smallest_batch)) {
        const std::string smallest = std::to_string(input.smallest_batch);
        if (count < input.smallest_batch) {
            throw Error("the number of images is " + std::to_string(count) +
                        ", but the model's smallest batch size is " + smallest +
                        ". If the images come from the file passed with --compare, pass a file with at least " +
                        smallest + " images. Otherwise, set --batch to at least " + smallest);
        }
        if (batch < input.smallest_batch || batch > input.largest_batch) {
            throw Error("--batch is " + std::to_string(batch) + ", but the model's smallest batch size is " +
                        smallest + " and the model's largest batch size is " + std::to_string(input.largest_batch) +
                        ". Set --batch to a value within these limits");
        }
        throw Error("with " + std::to_string(count) + " images and a batch size of " + std::to_string(batch) +
                    ", the last batch has the size " + std::to_string(rest) +
                    ", but the model's smallest batch size is " + smallest + ". Set --batch to a divisor of " +
                    std::to_string(count) + ". Or pass a --compare file whose number of images is a multiple of " +
                    std::to_string(batch));
    }
    std::vector<Tensor> outputs;
    for (std::int64_t first = 0; first < count; first += batch) {
        const std::int64_t size = std::min(batch, count - first);
        std::vector<Tensor> part = run(image.slice(first, size));
        for (const Tensor& output : part) {
            if (output.shape.empty() || output.shape[0] != size) {
                throw Error("the output " + output.name + " has the type and shape " + output.describe() +
                            ", but the batch size is " + std::to_string(size) +
                            ". The first dimension of every output must equal the batch size. Export the model again "
                            "with `neck-export onnx`");
            }
        }
        append(outputs, std::move(part));
    }
    return outputs;
}

Tensor first_batch(const Tensor& image, const Port& input, std::int64_t asked) {
    return image.slice(0, std::min(image.shape.at(0), asked > 0 ? asked : input.largest_batch));
}

Exit print_outputs(const Batch& batch, const std::vector<Tensor>& outputs, const std::optional<Reference>& reference,
                   const std::string& precision, const std::string& runtime) {
    const auto print = [](const Tensor& tensor) {
        std::cout << format("%-20s ", tensor.name.c_str()) << tensor.describe() << "\n";
    };
    if (!batch.fits.empty()) {
        const Fit& fit = batch.fits[0];
        std::cout << format("%-20s %lld x %lld pixels (height x width); one pixel of the model input covers "
                            "%.6f x %.6f pixels of the image\n",
                            "image", static_cast<long long>(fit.original.height),
                            static_cast<long long>(fit.original.width), fit.scale_y, fit.scale_x);
    }
    print(batch.image);
    std::for_each(outputs.begin(), outputs.end(), print);
    if (!reference) {
        return Exit::done;
    }
    const std::vector<Comparison> comparisons = compare(reference->outputs, outputs, precision);
    const std::int64_t count = reference->pixels.shape[0];
    std::cout << "comparing " << runtime << " with the PyTorch FP32 reference on " << count << " image"
              << (count > 1 ? "s" : "") << ", using the tolerances for " << precision << "\n";
    write_table(std::cout, comparisons);
    return passed(comparisons) ? Exit::done : Exit::not_equal;
}

int run_command(const std::string& name, const std::string& help, const std::function<Exit()>& command) {
    if (!fill_descriptors()) {
        std::cerr << name << ": standard output is closed; open it or redirect it to a file\n";
        return Exit::failed;
    }
    // a reader that went away, such as `head`, is told below instead
    std::signal(SIGPIPE, SIG_IGN);
    set_log([name](LogLevel level, const std::string& line) {
        if (level == LogLevel::warning) {  // an error of TensorRT's is in the message of what it lets fail
            std::cerr << name + ": " + line + "\n";
        }
    });
    Exit code = Exit::failed;
    try {
        code = command();
    } catch (const UsageError& error) {
        return print_usage(help, name + ": " + error.why);
    } catch (const Error& error) {
        std::cerr << name << ": " << error.what() << "\n";
    } catch (const std::bad_alloc&) {
        std::cerr << name << ": this machine is out of host memory; close other programs or use a smaller batch\n";
    } catch (const std::exception& error) {
        std::cerr << name << ": unexpected error (" << one_line(error.what()) << "); please report it\n";
    }
    set_log({});  // threads of TensorRT's may log until the process ends
    std::cout.flush();
    if (!std::cout) {
        std::cerr << name << ": cannot write to standard output; the pipe was closed, or the disk is full\n";
        return Exit::failed;
    }
    return code;
}

}  // namespace neck
