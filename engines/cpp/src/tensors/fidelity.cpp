#include "neck/fidelity.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ostream>

#include "neck/error.hpp"
#include "files/text.hpp"

namespace neck {

Tolerance tolerance_for(std::string_view name, std::string_view precision) {
    constexpr double none = std::numeric_limits<double>::infinity();
    Tolerance tolerance;
    double position_max_abs = none;
    if (precision == "fp32") {
        tolerance = {1e-4, 0.99999, none};
        position_max_abs = 1e-5;
    } else if (precision == "fp16") {
        tolerance = {1e-2, 0.9995, none};
        position_max_abs = 2e-3;
    } else if (precision == "bf16" || precision == "fp8" || precision == "int8") {
        tolerance = {5e-2, 0.998, none};
        position_max_abs = precision == "bf16" ? none : 2e-3;
    } else {
        throw Error("there are no tolerances for precision " + repr(precision) + "; use fp32, fp16, bf16, fp8 or int8");
    }
    if (name.find("_pos_") != std::string_view::npos) {
        tolerance.max_abs = position_max_abs;
    }
    return tolerance;
}

bool Comparison::passed() const {
    return non_finite == 0 && relative_l2 <= tolerance.relative_l2 && cosine >= tolerance.cosine &&
           max_abs <= tolerance.max_abs;
}

Comparison compare_output(const Tensor& reference, const Tensor& candidate, const Tolerance& tolerance) {
    reference.check();
    candidate.check();
    if (reference.shape != candidate.shape) {
        throw Error("output " + candidate.name + " has the shape " + to_text(candidate.shape) +
                    ", but its shape in the reference is " + to_text(reference.shape) + "; use a reference with the "
                    "same images and image size");
    }
    const std::vector<float> left = reference.to_floats();
    const std::vector<float> right = candidate.to_floats();
    double largest = 0;
    double total = 0;
    double error = 0;
    double norm = 0;
    double other = 0;
    double dot = 0;
    std::int64_t non_finite = 0;
    for (std::size_t index = 0; index < left.size(); ++index) {
        const double a = left[index];
        const double b = right[index];
        const double difference = std::abs(a - b);
        non_finite += std::isfinite(b) ? 0 : 1;
        // a difference that is no number, from a reference that is not finite, must stay the largest
        largest = largest >= difference || std::isnan(largest) ? largest : difference;
        total += difference;
        error += difference * difference;
        norm += a * a;
        other += b * b;
        dot += a * b;
    }
    if (non_finite > 0) {
        constexpr double infinity = std::numeric_limits<double>::infinity();
        return {candidate.name, infinity, infinity, infinity, 0.0, non_finite, tolerance};
    }
    const double relative = norm > 0 || std::isnan(norm) ? std::sqrt(error / norm)
                            : error > 0                  ? std::numeric_limits<double>::infinity()
                                                         : 0.0;
    const double cosine = norm != 0 && other != 0 ? dot / std::sqrt(norm * other) : norm == other ? 1.0 : 0.0;
    const double count = static_cast<double>(std::max<std::size_t>(1, left.size()));
    return {candidate.name, largest, total / count, relative, cosine, 0, tolerance};
}

namespace {

/// The tolerance of an output of this type: a type that rounds more than the precision brings its own.
Tolerance tolerance_of(const Tensor& output, std::string_view precision) {
    Tolerance tolerance = tolerance_for(output.name, precision);
    if (output.type == DataType::float16 || output.type == DataType::bfloat16) {
        const Tolerance own = tolerance_for(output.name, output.type == DataType::float16 ? "fp16" : "bf16");
        tolerance.relative_l2 = std::max(tolerance.relative_l2, own.relative_l2);
        tolerance.cosine = std::min(tolerance.cosine, own.cosine);
        tolerance.max_abs = std::max(tolerance.max_abs, own.max_abs);
    }
    return tolerance;
}

}  // namespace

std::vector<Comparison> compare(const std::vector<Tensor>& reference, const std::vector<Tensor>& candidate,
                                std::string_view precision) {
    std::vector<Comparison> comparisons;
    comparisons.reserve(candidate.size());
    for (const Tensor& tensor : candidate) {
        const auto found = std::find_if(reference.begin(), reference.end(),
                                        [&](const Tensor& other) { return other.name == tensor.name; });
        if (found == reference.end()) {
            throw Error("output " + tensor.name + " is missing from the reference, which contains " +
                        joined(reference, [](const Tensor& other) { return other.name; }) +
                        "; use a reference for this model");
        }
        comparisons.push_back(compare_output(*found, tensor, tolerance_of(tensor, precision)));
    }
    return comparisons;
}

bool passed(const std::vector<Comparison>& comparisons) {
    return !comparisons.empty() &&
           std::all_of(comparisons.begin(), comparisons.end(), [](const Comparison& each) { return each.passed(); });
}

void write_table(std::ostream& out, const std::vector<Comparison>& comparisons) {
    out << format("%-20s %10s %10s %10s %11s  verdict\n", "output", "max abs", "mean abs", "rel. L2", "cosine");
    for (const Comparison& row : comparisons) {
        const std::string word = row.passed()         ? "ok"
                                 : row.non_finite > 0 ? std::to_string(row.non_finite) + " non-finite"
                                                      : "FAILED";
        out << format("%-20s %10.2e %10.2e %10.2e %11.8f  %s\n", row.name.c_str(), row.max_abs, row.mean_abs,
                      row.relative_l2, row.cosine, word.c_str());
    }
}

}  // namespace neck
