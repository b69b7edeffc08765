#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "neck/preprocess.hpp"
#include "neck/reference.hpp"
#include "neck/tensor.hpp"

namespace neck {

/// Exit codes, those of `neck-export`.
enum Exit : int { done = 0, failed = 1, usage = 2, not_equal = 3 };

/// A call of the command that is not as its help says.
struct UsageError {
    std::string why;
};

/// A whole number above 0, such as the value of `--batch`.
/// \throws UsageError
std::int64_t parse_count(const std::string& option, const std::string& text);

/// What both commands are asked for.
struct Asked {
    std::string target;  ///< a plan, or a server
    std::optional<std::string> image;
    std::optional<std::string> reference;  ///< `--compare`
    std::int64_t batch = 0;                ///< 0: not told
    std::int64_t runs = 0;
    bool help = false;
};

/// An option of one command alone: its name, whether it has a value, and what takes that.
struct Option {
    const char* name;
    bool has_value;
    std::function<void(const std::string&)> take;
};

/// Reads a command line: target, image, the options of both commands and those given.
/// \throws UsageError
void parse(int count, char** values, Asked& asked, const std::vector<Option>& options);

/// Milliseconds of runs; percentiles are interpolated.
struct Latency {
    double mean = 0;
    double p50 = 0;
    double p90 = 0;
    double p95 = 0;
    double p99 = 0;
    std::size_t runs = 0;
};
Latency summarize(std::vector<double> milliseconds);

/// Prints a heading and one line per work.
void print_latencies(const std::string& clock, const std::vector<std::pair<std::string, Latency>>& rows);

/// The reference that was asked for.
std::optional<Reference> read_asked(const Asked& asked);

/// What is run, as the model takes it: the file's image and its fit, the reference's images, or else gray ones.
Batch choose_image(const Asked& asked, const Port& input, const std::optional<Reference>& reference);

/// Runs images in batches that the model takes and joins the outputs.
/// \param asked the batch; 0: the largest that is not above the images'.
/// \throws Error images that do not divide into batches that the model takes.
std::vector<Tensor> run_in_batches(const Tensor& image, const Port& input, std::int64_t asked,
                                   const std::function<std::vector<Tensor>(const Tensor&)>& run);

/// The first images, as many as one run takes.
Tensor first_batch(const Tensor& image, const Port& input, std::int64_t asked);

/// Prints name, type and shape of the input and the outputs, how an image was fitted and, where there is a reference,
/// their error figures. \return Exit::done or Exit::not_equal
Exit print_outputs(const Batch& batch, const std::vector<Tensor>& outputs, const std::optional<Reference>& reference,
                   const std::string& precision, const std::string& runtime);

/// Runs a command: errors go to stderr in one line, and a standard output that is closed is one of them.
int run_command(const std::string& name, const std::string& help, const std::function<Exit()>& command);

}  // namespace neck
