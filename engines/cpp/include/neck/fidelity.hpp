#pragma once

#include <cstdint>
#include <iosfwd>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "neck/export.hpp"
#include "neck/tensor.hpp"

namespace neck {

/// What an output may differ from the reference; export/verification/fidelity.py has the same figures.
struct Tolerance {
    double relative_l2 = 0;
    double cosine = 1;
    double max_abs = std::numeric_limits<double>::infinity();
};

/// The tolerance of an output, such as `sam3_feat_0`.
/// \throws Error a precision that is not fp32, fp16, bf16, fp8 or int8.
NECK_API Tolerance tolerance_for(std::string_view name, std::string_view precision);

/// The error figures of one output, and whether they are within tolerance.
struct NECK_API Comparison {
    std::string name;
    double max_abs = 0;
    double mean_abs = 0;
    double relative_l2 = 0;
    double cosine = 1;
    std::int64_t non_finite = 0;
    Tolerance tolerance;

    bool passed() const;
};

/// Compares one output with the reference's, sums in double.
/// \throws Error another shape than the reference's, or data that are not those of a shape.
NECK_API Comparison compare_output(const Tensor& reference, const Tensor& candidate, const Tolerance& tolerance);

/// Compares every output of the candidate with the reference's.
/// \throws Error an output that the reference lacks, or of another shape.
NECK_API std::vector<Comparison> compare(const std::vector<Tensor>& reference, const std::vector<Tensor>& candidate,
                                std::string_view precision);

/// Whether there are outputs and all of them passed.
NECK_API bool passed(const std::vector<Comparison>& comparisons);

/// Writes the table of figures that `neck-export verify` shows.
NECK_API void write_table(std::ostream& out, const std::vector<Comparison>& comparisons);

}  // namespace neck
