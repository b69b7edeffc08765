#include "images/resize.hpp"

#include <algorithm>
#include <array>
#include <vector>

namespace neck {
namespace {

/// Where rows can be read a little beyond their end: the last ones of an image are copied.
class Rows {
public:
    explicit Rows(const PixelView& pixels)
        : pixels_(pixels), bytes_(static_cast<std::size_t>(pixels.size.width) * 3), copies_(rows_together * stride()) {}

    /// Row `index`, or the last one where there is none, as the `slot`th of those that are read together.
    const std::uint8_t* at(std::int64_t index, std::size_t slot) {
        const std::int64_t last = pixels_.size.height - 1;
        const std::int64_t row = std::min(index, last);
        const std::uint8_t* line = pixels_.data + static_cast<std::size_t>(row) * pixels_.pitch;
        if (static_cast<std::size_t>(last - row) * pixels_.pitch >= row_slack) {
            return line;
        }
        std::copy_n(line, bytes_, copies_.begin() + static_cast<std::ptrdiff_t>(slot * stride()));
        return copies_.data() + slot * stride();
    }

private:
    std::size_t stride() const { return bytes_ + row_slack; }

    const PixelView& pixels_;
    std::size_t bytes_;
    std::vector<std::uint8_t> copies_;
};

}  // namespace

void resize_rows(const PixelView& pixels, const Taps& down, const Taps& across, std::int64_t first, std::int64_t last,
                 const std::function<void(std::int64_t, const std::uint8_t*)>& take, const ResizeKernels& kernels) {
    const std::size_t count = across.spans().size() * 3;
    const std::size_t pitch = (count / row_slack + 2) * row_slack;
    // of the rows whose columns are done only those that are still needed are kept, in the cache: twice as many as one
    // new row takes, so that they are moved to the front once in as many rows
    std::size_t most = 0;
    for (const Taps::Span& span : down.spans()) {
        most = std::max(most, 2 * span.pairs);
    }
    const std::size_t room = 2 * most + 2 * rows_together;
    std::vector<std::uint8_t> narrow(room * pitch);
    std::vector<std::uint8_t> made(pitch);
    Rows rows(pixels);
    std::int64_t begin = first < last ? down.spans()[static_cast<std::size_t>(first)].first : 0;
    std::int64_t end = begin;  // rows begin to end are there
    for (std::int64_t index = first; index < last; ++index) {
        const Taps::Span& span = down.spans()[static_cast<std::size_t>(index)];
        const std::int64_t needed = span.first + static_cast<std::int64_t>(2 * span.pairs);
        while (end < needed) {
            if (static_cast<std::size_t>(end - begin) + rows_together > room) {
                const auto from =
                    narrow.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(span.first - begin) * pitch);
                std::copy(from,
                          narrow.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(end - begin) * pitch),
                          narrow.begin());
                begin = span.first;
            }
            const std::array<const std::uint8_t*, rows_together> lines{rows.at(end, 0), rows.at(end + 1, 1),
                                                                       rows.at(end + 2, 2), rows.at(end + 3, 3)};
            kernels.columns(lines, across, narrow.data() + static_cast<std::size_t>(end - begin) * pitch, pitch);
            end += static_cast<std::int64_t>(rows_together);
        }
        kernels.rows(narrow.data() + static_cast<std::size_t>(span.first - begin) * pitch, pitch, down, span, count,
                     made.data());
        take(index, made.data());
    }
}

}  // namespace neck
