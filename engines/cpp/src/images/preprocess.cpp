#include "neck/preprocess.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <future>
#include <string>
#include <utility>

#include "files/guard.hpp"
#include "neck/error.hpp"
#include "images/resize.hpp"
#include "images/taps.hpp"

namespace neck {
namespace {

/// 0..255 to -1..1; the bits are those of neck/images.py.
std::array<float, 256> make_levels() {
    std::array<float, 256> levels{};
    for (std::size_t level = 0; level < levels.size(); ++level) {
        levels[level] = normalized(static_cast<std::uint8_t>(level));
    }
    return levels;
}

/// One channel of a row, out of RGB.
void normalize_row(const std::uint8_t* colors, std::size_t width, std::byte* target) {
    static const std::array<float, 256> levels = make_levels();
    for (std::size_t column = 0; column < width; ++column) {
        std::memcpy(target + column * sizeof(float), &levels[colors[column * 3]], sizeof(float));
    }
}

/// Shares `count` pieces of work out to threads; the first exception of any is thrown when all have ended.
void share(int threads, std::int64_t count, const std::function<void(std::int64_t, std::int64_t)>& work) {
    const std::int64_t parts = std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(1, count));
    std::vector<std::future<void>> others;
    for (std::int64_t part = 1; part < parts; ++part) {
        others.push_back(
            std::async(std::launch::async, [&, part] { work(count * part / parts, count * (part + 1) / parts); }));
    }
    work(0, count / parts);
    for (std::future<void>& other : others) {
        other.get();
    }
}

}  // namespace

Fit fit_of(Size original, Size wanted) {
    return {original, static_cast<double>(original.height) / static_cast<double>(wanted.height),
            static_cast<double>(original.width) / static_cast<double>(wanted.width)};
}

Preprocessor::Preprocessor(Port input, int threads, ImageLimits limits)
    : input_(std::move(input)), size_(image_size(input_)), threads_(std::max(1, threads)), limits_(limits) {}

Tensor Preprocessor::empty(std::size_t count) const {
    return {input_.name, input_.type, input_.at(static_cast<std::int64_t>(count))};
}

/// Writes one image where the model reads it: uint8 (H, W, 3), or float32 (3, H, W).
void Preprocessor::put(const std::byte* pixels, Size size, std::byte* target, int threads) const {
    const PixelView view{reinterpret_cast<const std::uint8_t*>(pixels), size, static_cast<std::size_t>(size.width) * 3};
    const auto width = static_cast<std::size_t>(size_.width);
    const auto take = [&](std::int64_t row, const std::uint8_t* colors) {
        if (input_.type == DataType::uint8) {
            std::memcpy(target + static_cast<std::size_t>(row) * width * 3, colors, width * 3);
            return;
        }
        for (std::size_t channel = 0; channel < 3; ++channel) {
            const std::size_t at =
                (channel * static_cast<std::size_t>(size_.height) + static_cast<std::size_t>(row)) * width;
            normalize_row(colors + channel, width, target + at * sizeof(float));
        }
    };
    if (size.height == size_.height && size.width == size_.width) {
        for (std::int64_t row = 0; row < size.height; ++row) {
            take(row, view.data + static_cast<std::size_t>(row) * view.pitch);
        }
        return;
    }
    const Taps down(size.height, size_.height);
    const Taps across(size.width, size_.width);
    share(threads, size_.height,
          [&](std::int64_t first, std::int64_t last) { resize_rows(view, down, across, first, last, take); });
}

/// Fills a batch with images, whose pixels `pixels_of` gives by their number, from several threads.
Batch Preprocessor::collect(std::size_t images, const std::function<Tensor(std::size_t)>& pixels_of) const {
    if (images == 0) {
        throw Error("no images were passed; pass at least one image");
    }
    Batch batch{empty(images), std::vector<Fit>(images)};
    const auto count = static_cast<std::int64_t>(images);
    const std::size_t each = batch.image.data.size() / images;
    const int threads = std::max<int>(1, threads_ / static_cast<int>(std::min<std::int64_t>(count, threads_)));
    share(threads_, count, [&](std::int64_t first, std::int64_t last) {
        for (auto index = static_cast<std::size_t>(first); index < static_cast<std::size_t>(last); ++index) {
            const Tensor pixels = pixels_of(index);
            const Size size{pixels.shape[1], pixels.shape[2]};
            put(pixels.data.data(), size, batch.image.data.data() + index * each, threads);
            batch.fits[index] = fit_of(size, size_);
        }
    });
    return batch;
}

Batch Preprocessor::read(const std::vector<std::filesystem::path>& images) const {
    return guarded("preparing images", [&] {
        return collect(images.size(), [&](std::size_t index) { return read_image(images[index], limits_); });
    });
}

Batch Preprocessor::decode(const std::vector<std::string_view>& images) const {
    return guarded("preparing images", [&] {
        return collect(images.size(), [&](std::size_t index) {
            const std::string name = "image " + std::to_string(index + 1) + " of " + std::to_string(images.size());
            return decode_image(images[index].data(), images[index].size(), limits_, name);
        });
    });
}

Batch Preprocessor::prepare(const Tensor& pixels) const {
    return guarded("preparing images", [&] { return fit(pixels); });
}

Batch Preprocessor::fit(const Tensor& pixels) const {
    if (pixels.type != DataType::uint8 || pixels.shape.size() != 4 || pixels.shape[3] != 3 || pixels.data.empty() ||
        pixels.data.size() != bytes_of(pixels.type, pixels.shape)) {
        throw Error("the pixels are " + pixels.describe() +
                    ", but they must be a non-empty uint8 array (B, H, W, 3) in RGB");
    }
    const auto count = static_cast<std::size_t>(pixels.shape[0]);
    const Size size{pixels.shape[1], pixels.shape[2]};
    Batch batch{empty(count), std::vector<Fit>(count, fit_of(size, size_))};
    const std::size_t each = batch.image.data.size() / count;
    for (std::size_t index = 0; index < count; ++index) {
        put(pixels.data.data() + index * (pixels.data.size() / count), size, batch.image.data.data() + index * each,
            threads_);
    }
    return batch;
}

}  // namespace neck
