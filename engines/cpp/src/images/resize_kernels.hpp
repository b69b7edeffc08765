#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace neck {

/// Which pixels of a side make each pixel of another, and by what weights, in whole numbers.
class Taps {
public:
    struct Span {
        std::int64_t first = 0;
        std::size_t pairs = 0;  ///< of pixels; where their number is odd the last weighs nothing
        std::size_t pairs_at = 0;
    };
    Taps(std::int64_t from, std::int64_t to);

    const std::vector<Span>& spans() const { return spans_; }

    /// Weights times 2^shift, 16 bits each, two in one number: the first in its lower half.
    const std::uint32_t* pairs_of(const Span& span) const { return pairs_.data() + span.pairs_at; }

    /// The largest at which no weight leaves 16 bits and no sum leaves 32: what a weight loses by rounding moves a sum
    /// by 0.2 of a level at most (6000 pixels to one), by 0.01 as a rule.
    int shift() const { return shift_; }

private:
    std::vector<Span> spans_;
    std::vector<std::uint32_t> pairs_;
    int shift_ = 22;
};

constexpr std::size_t rows_together = 4;  ///< whose columns are summed at a time
constexpr std::size_t row_slack = 16;     ///< bytes after a row that may be read

/// The two passes over pixels. All give the same bits.
struct ResizeKernels {
    /// Makes four rows narrower or wider. Writes a byte more than each has.
    void (*columns)(const std::array<const std::uint8_t*, rows_together>& rows, const Taps& across,
                    std::uint8_t* target, std::size_t pitch);
    /// Makes one row of `count` bytes out of several; reads and writes up to a multiple of 16 bytes.
    void (*rows)(const std::uint8_t* lines, std::size_t pitch, const Taps& down, const Taps::Span& span,
                 std::size_t count, std::uint8_t* target);
};

const ResizeKernels& plain_kernels();

/// Those of AVX2 where this processor has it.
const ResizeKernels& best_kernels();

}  // namespace neck
