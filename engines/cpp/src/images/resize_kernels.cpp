#include "images/resize_kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "images/taps.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace neck {
namespace {

constexpr int most_shift = 22;  // 255 * 2^22 and what rounding adds stay below 2^31

int weight_of(std::uint32_t pair, int which) { return static_cast<std::int16_t>(which == 0 ? pair : pair >> 16U); }

std::uint8_t level_of(int sum, int shift) { return static_cast<std::uint8_t>(std::clamp(sum >> shift, 0, 255)); }

void plain_columns(const std::array<const std::uint8_t*, rows_together>& rows, const Taps& across, std::uint8_t* target,
                   std::size_t pitch) {
    const int half = 1 << (across.shift() - 1);  // to the nearest
    for (const Taps::Span& span : across.spans()) {
        const std::uint32_t* pairs = across.pairs_of(span);
        for (std::size_t row = 0; row < rows_together; ++row) {
            std::array<int, 3> sums{half, half, half};
            const std::uint8_t* from = rows[row] + span.first * 3;
            for (std::size_t tap = 0; tap < span.pairs; ++tap, from += 6) {
                for (std::size_t channel = 0; channel < 3; ++channel) {
                    sums[channel] +=
                        weight_of(pairs[tap], 0) * from[channel] + weight_of(pairs[tap], 1) * from[channel + 3];
                }
            }
            for (std::size_t channel = 0; channel < 3; ++channel) {
                target[row * pitch + channel] = level_of(sums[channel], across.shift());
            }
        }
        target += 3;
    }
}

void plain_rows(const std::uint8_t* lines, std::size_t pitch, const Taps& down, const Taps::Span& span,
                std::size_t count, std::uint8_t* target) {
    const std::uint32_t* pairs = down.pairs_of(span);
    for (std::size_t at = 0; at < count; ++at) {
        int sum = 1 << (down.shift() - 1);
        const std::uint8_t* from = lines + at;
        for (std::size_t tap = 0; tap < span.pairs; ++tap, from += 2 * pitch) {
            sum += weight_of(pairs[tap], 0) * from[0] + weight_of(pairs[tap], 1) * from[pitch];
        }
        target[at] = level_of(sum, down.shift());
    }
}

#if defined(__x86_64__)

[[gnu::target("avx2")]] __m256i load_two(const std::uint8_t* low, const std::uint8_t* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

[[gnu::target("avx2")]] void avx2_columns(const std::array<const std::uint8_t*, rows_together>& rows,
                                          const Taps& across, std::uint8_t* target, std::size_t pitch) {
    // RGB RGB to R R G G B B, 16 bits each: the first two pixels of four, and the other two; two rows in one register
    const __m256i first = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,  //
                                           0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
    const __m256i second = _mm256_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1,  //
                                            6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m256i half = _mm256_set1_epi32(1 << (across.shift() - 1));
    const __m128i shift = _mm_cvtsi32_si128(across.shift());
    for (const Taps::Span& span : across.spans()) {
        const std::uint32_t* pairs = across.pairs_of(span);
        std::ptrdiff_t at = span.first * 3;
        __m256i upper = half;  // rows 0 and 1
        __m256i lower = half;  // rows 2 and 3
        std::size_t tap = 0;
        for (; tap + 2 <= span.pairs; tap += 2, at += 12) {
            const __m256i one = _mm256_set1_epi32(static_cast<int>(pairs[tap]));
            const __m256i two = _mm256_set1_epi32(static_cast<int>(pairs[tap + 1]));
            const __m256i above = load_two(rows[0] + at, rows[1] + at);
            const __m256i below = load_two(rows[2] + at, rows[3] + at);
            upper = _mm256_add_epi32(upper, _mm256_madd_epi16(_mm256_shuffle_epi8(above, first), one));
            lower = _mm256_add_epi32(lower, _mm256_madd_epi16(_mm256_shuffle_epi8(below, first), one));
            upper = _mm256_add_epi32(upper, _mm256_madd_epi16(_mm256_shuffle_epi8(above, second), two));
            lower = _mm256_add_epi32(lower, _mm256_madd_epi16(_mm256_shuffle_epi8(below, second), two));
        }
        if (tap < span.pairs) {
            const __m256i one = _mm256_set1_epi32(static_cast<int>(pairs[tap]));
            const __m256i above = load_two(rows[0] + at, rows[1] + at);
            const __m256i below = load_two(rows[2] + at, rows[3] + at);
            upper = _mm256_add_epi32(upper, _mm256_madd_epi16(_mm256_shuffle_epi8(above, first), one));
            lower = _mm256_add_epi32(lower, _mm256_madd_epi16(_mm256_shuffle_epi8(below, first), one));
        }
        // to bytes: row 0, row 2 | row 1, row 3, four bytes each
        const __m256i words = _mm256_packs_epi32(_mm256_sra_epi32(upper, shift), _mm256_sra_epi32(lower, shift));
        const __m256i bytes = _mm256_packus_epi16(words, words);
        const std::array<int, rows_together> colors{_mm256_extract_epi32(bytes, 0), _mm256_extract_epi32(bytes, 4),
                                                     _mm256_extract_epi32(bytes, 1), _mm256_extract_epi32(bytes, 5)};
        for (std::size_t row = 0; row < rows_together; ++row) {
            std::memcpy(target + row * pitch, &colors[row], 4);  // the fourth byte is the next pixel's
        }
        target += 3;
    }
}

[[gnu::target("avx2")]] void avx2_rows(const std::uint8_t* lines, std::size_t pitch, const Taps& down,
                                       const Taps::Span& span, std::size_t count, std::uint8_t* target) {
    const std::uint32_t* pairs = down.pairs_of(span);
    const __m256i half = _mm256_set1_epi32(1 << (down.shift() - 1));
    const __m128i shift = _mm_cvtsi32_si128(down.shift());
    for (std::size_t at = 0; at < count; at += 16) {
        const std::uint8_t* from = lines + at;
        __m256i left = half;
        __m256i right = half;
        for (std::size_t tap = 0; tap < span.pairs; ++tap, from += 2 * pitch) {
            const __m256i weights = _mm256_set1_epi32(static_cast<int>(pairs[tap]));
            const __m128i above = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
            const __m128i below = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + pitch));
            const __m256i low = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(above, below));
            const __m256i high = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(above, below));
            left = _mm256_add_epi32(left, _mm256_madd_epi16(low, weights));
            right = _mm256_add_epi32(right, _mm256_madd_epi16(high, weights));
        }
        // packing works on halves of a register: the order is mended after each
        const __m256i words = _mm256_permute4x64_epi64(
            _mm256_packs_epi32(_mm256_sra_epi32(left, shift), _mm256_sra_epi32(right, shift)), 0xd8);
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target + at), _mm256_castsi256_si128(bytes));
    }
}

#endif

constexpr ResizeKernels plain_passes{plain_columns, plain_rows};

}  // namespace

Taps::Taps(std::int64_t from, std::int64_t to) : shift_(most_shift) {
    std::vector<std::vector<double>> all(static_cast<std::size_t>(to));
    double largest = 0;
    for (std::int64_t index = 0; index < to; ++index) {
        const TapSpan span(from, to, index);
        std::vector<double>& weights = all[static_cast<std::size_t>(index)];
        double total = 0;
        for (std::int64_t at = span.first; at < span.end; ++at) {
            weights.push_back(span.weight(at));
            total += weights.back();
        }
        for (double& weight : weights) {
            weight /= total;
            largest = std::max(largest, weight);
        }
        const std::size_t pairs = (weights.size() + 1) / 2;
        weights.resize(2 * pairs);
        spans_.push_back({span.first, pairs, spans_.empty() ? 0 : spans_.back().pairs_at + spans_.back().pairs});
    }
    while (largest * std::ldexp(1.0, shift_) > 32767) {
        --shift_;
    }
    for (const std::vector<double>& weights : all) {
        for (std::size_t at = 0; at < weights.size(); at += 2) {
            const auto fixed = [&](std::size_t which) {
                return static_cast<std::uint32_t>(std::lround(std::ldexp(weights[which], shift_)));
            };
            pairs_.push_back(fixed(at) | fixed(at + 1) << 16U);
        }
    }
}

const ResizeKernels& plain_kernels() { return plain_passes; }

const ResizeKernels& best_kernels() {
#if defined(__x86_64__)
    static constexpr ResizeKernels avx2{avx2_columns, avx2_rows};
    static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;
    return has_avx2 ? avx2 : plain_passes;
#else
    return plain_passes;
#endif
}

}  // namespace neck
