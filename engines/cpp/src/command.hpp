#pragma once

#include <getopt.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "neck/npz.hpp"
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

/// Reads the options of a command line, each taken by its letter with its value in `optarg`.
/// \return what is no option.
std::vector<std::string> parse_options(int count, char** values, const option* options,
                                       const std::function<void(int)>& take);

/// Milliseconds of runs; percentiles are interpolated.
struct Latency {
    double mean = 0;
    double p50 = 0;
    double p90 = 0;
    double p95 = 0;
    double p99 = 0;
    std::size_t runs = 0;
};
Latency summarise(std::vector<double> milliseconds);

/// Prints a heading and one line per work.
void print_latencies(const std::string& clock, const std::vector<std::pair<std::string, Latency>>& rows);

/// Prints name, type and shape of every tensor.
void print_shapes(const std::vector<Tensor>& tensors);

/// Runs pictures in batches that the model takes and joins the outputs.
/// \param asked the batch; 0: the largest that is not above the pictures'.
/// \throws Error pictures that do not divide into batches that the model takes.
std::vector<Tensor> run_in_batches(const Tensor& image, const Port& input, std::int64_t asked,
                                   const std::function<std::vector<Tensor>(const Tensor&)>& run);

/// Prints the error figures of every output against the reference's.
/// \return Exit::done or Exit::not_equal
Exit print_comparison(const Reference& reference, const std::vector<Tensor>& outputs, const std::string& precision,
                      const std::string& runtime);

/// Runs a command: errors go to stderr in one line, and a standard output that is closed is one of them.
int run_command(const std::string& name, const std::string& help, const std::function<Exit()>& command);

}  // namespace neck
