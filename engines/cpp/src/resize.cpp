#include "resize.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace neck {
namespace {

// GNU's vectors, which gcc and clang have for every processor: four floats at once
using Four = float __attribute__((vector_size(16)));

/// Levels as floats: what columns are summed from.
[[gnu::always_inline]] inline void to_floats_body(const std::uint8_t* row, std::size_t count, float* floats) {
    for (std::size_t at = 0; at < count; ++at) {
        floats[at] = static_cast<float>(row[at]);
    }
}

/// One row of a picture that is made of `count` rows; four at a time, for the sums are read and written in whole.
[[gnu::always_inline]] inline void sum_rows_body(const std::uint8_t* line, std::size_t pitch, const float* weights,
                                                 std::size_t taps, std::size_t count, float* sums, std::uint8_t* row) {
    std::fill_n(sums, count, 0.5F);  // to the nearest
    std::size_t tap = 0;
    for (; tap + 4 <= taps; tap += 4, line += 4 * pitch) {
        const float a = weights[tap], b = weights[tap + 1], c = weights[tap + 2], d = weights[tap + 3];
        const std::uint8_t *p = line, *q = p + pitch, *r = q + pitch, *s = r + pitch;
        for (std::size_t at = 0; at < count; ++at) {
            sums[at] += a * static_cast<float>(p[at]) + b * static_cast<float>(q[at]) +
                        (c * static_cast<float>(r[at]) + d * static_cast<float>(s[at]));
        }
    }
    for (; tap < taps; ++tap, line += pitch) {
        const float weight = weights[tap];
        for (std::size_t at = 0; at < count; ++at) {
            sums[at] += weight * static_cast<float>(line[at]);
        }
    }
    for (std::size_t at = 0; at < count; ++at) {
        row[at] = static_cast<std::uint8_t>(static_cast<int>(sums[at]));
    }
}

constexpr std::size_t together = 4;  // rows whose columns are summed at a time: one sum alone waits for each addition

[[gnu::always_inline]] inline void sum_columns_body(const float* levels, std::size_t stride, const Taps& across,
                                                    std::uint8_t* rows, std::size_t pitch) {
    for (const Taps::Span& span : across.spans()) {
        const float* weights = across.weights_of(span);
        const float* from = levels + span.first * 3;
        constexpr Four half{0.5F, 0.5F, 0.5F, 0.5F};  // to the nearest
        std::array<Four, together> totals{half, half, half, half};
        for (std::size_t tap = 0; tap < span.count; ++tap, from += 3) {
            for (std::size_t row = 0; row < together; ++row) {
                Four colours;  // red, green, blue, and what comes after
                std::memcpy(&colours, from + row * stride, sizeof colours);
                totals[row] += colours * weights[tap];
            }
        }
        for (std::size_t row = 0; row < together; ++row) {
            for (std::size_t channel = 0; channel < 3; ++channel) {
                rows[row * pitch + channel] = static_cast<std::uint8_t>(static_cast<int>(totals[row][channel]));
            }
        }
        rows += 3;
    }
}

#if defined(__x86_64__)
[[gnu::target("avx2")]] void to_floats_avx2(const std::uint8_t* row, std::size_t count, float* floats) {
    to_floats_body(row, count, floats);
}
[[gnu::target("avx2")]] void sum_rows_avx2(const std::uint8_t* line, std::size_t pitch, const float* weights,
                                           std::size_t taps, std::size_t count, float* sums, std::uint8_t* row) {
    sum_rows_body(line, pitch, weights, taps, count, sums, row);
}
[[gnu::target("avx2")]] void sum_columns_avx2(const float* levels, std::size_t stride, const Taps& across,
                                              std::uint8_t* rows, std::size_t pitch) {
    sum_columns_body(levels, stride, across, rows, pitch);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") != 0; }
#else
constexpr auto to_floats_avx2 = to_floats_body;
constexpr auto sum_rows_avx2 = sum_rows_body;
constexpr auto sum_columns_avx2 = sum_columns_body;
bool has_avx2() { return false; }
#endif

void to_floats(const std::uint8_t* row, std::size_t count, float* floats) {
    static const auto chosen = has_avx2() ? to_floats_avx2 : to_floats_body;
    chosen(row, count, floats);
}

void sum_rows(const std::uint8_t* line, std::size_t pitch, const float* weights, std::size_t taps, std::size_t count,
              float* sums, std::uint8_t* row) {
    static const auto chosen = has_avx2() ? sum_rows_avx2 : sum_rows_body;
    chosen(line, pitch, weights, taps, count, sums, row);
}

void sum_columns(const float* levels, std::size_t stride, const Taps& across, std::uint8_t* rows, std::size_t pitch) {
    static const auto chosen = has_avx2() ? sum_columns_avx2 : sum_columns_body;
    chosen(levels, stride, across, rows, pitch);
}

}  // namespace

Taps::Taps(std::int64_t from, std::int64_t to) {
    const double scale = static_cast<double>(from) / static_cast<double>(to);
    const double reach = std::max(1.0, scale);  // of the triangle that weights: one pixel or more
    for (std::int64_t index = 0; index < to; ++index) {
        const double center = (static_cast<double>(index) + 0.5) * scale;
        const auto first = std::max<std::int64_t>(0, static_cast<std::int64_t>(center - reach + 0.5));
        const auto end = std::min(from, static_cast<std::int64_t>(center + reach + 0.5));
        std::vector<double> weights;
        double total = 0;
        for (std::int64_t at = first; at < end; ++at) {
            const double distance = std::abs(static_cast<double>(at) - center + 0.5) / reach;
            weights.push_back(std::max(0.0, 1.0 - distance));
            total += weights.back();
        }
        spans_.push_back({first, weights.size(), weights_.size()});
        for (const double weight : weights) {
            weights_.push_back(static_cast<float>(weight / total));
        }
    }
}

void resize_rows(const PixelView& pixels, const Taps& down, const Taps& across, std::int64_t first, std::int64_t last,
                 const std::function<void(std::int64_t, const std::uint8_t*)>& take) {
    if (first >= last) {
        return;
    }
    const std::size_t count = across.spans().size() * 3;
    const std::int64_t begin = down.spans()[static_cast<std::size_t>(first)].first;
    const Taps::Span& bottom = down.spans()[static_cast<std::size_t>(last - 1)];
    const auto height = static_cast<std::size_t>(bottom.first - begin) + bottom.count;
    const std::size_t wide = static_cast<std::size_t>(pixels.size.width) * 3;
    std::vector<float> floats(std::max(count, together * wide + 1));  // read by fours
    std::vector<std::uint8_t> narrow((height + together) * count);
    for (std::size_t row = 0; row < height; ++row) {
        const std::uint8_t* line = pixels.data + (static_cast<std::size_t>(begin) + row) * pixels.pitch;
        to_floats(line, wide, floats.data() + row % together * wide);
        if (row % together == together - 1 || row == height - 1) {
            sum_columns(floats.data(), wide, across, narrow.data() + row / together * together * count, count);
        }
    }
    std::vector<std::uint8_t> row(count);
    for (std::int64_t index = first; index < last; ++index) {
        const Taps::Span& span = down.spans()[static_cast<std::size_t>(index)];
        sum_rows(narrow.data() + static_cast<std::size_t>(span.first - begin) * count, count, down.weights_of(span),
                 span.count, count, floats.data(), row.data());
        take(index, row.data());
    }
}

}  // namespace neck
