#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <string_view>
#include <vector>

#include "neck/export.hpp"
#include "neck/image.hpp"
#include "neck/tensor.hpp"

namespace neck {

/// How an image was brought to a model's size, straight, without keeping its aspect.
struct Fit {
    Size original;       ///< upright
    double scale_y = 1;  ///< pixels of the original for one of the model's: a box's y times this is the original's
    double scale_x = 1;
};

/// The fit of an image to a model's size.
NECK_API Fit fit_of(Size original, Size wanted);

/// Images as a model takes them.
struct Batch {
    Tensor image;
    std::vector<Fit> fits;  ///< one for each image
};

/// Any image to a model's input: read, resized (bilinear with antialias), normalized where the input is float.
///
/// Every value is within one level of 255 of what neck/images.py gives. Its methods may be called from many threads.
class NECK_API Preprocessor {
public:
    /// \param input of a model: float32 (B, 3, H, W) or uint8 (B, H, W, 3).
    /// \param threads that one call may use.
    /// \param limits of each image file.
    /// \throws Error an input of another kind.
    explicit Preprocessor(Port input, int threads = 1, ImageLimits limits = {});

    /// Reads PNG and JPEG files.
    /// \throws Error no image, or the first that cannot be used; the message names it.
    Batch read(const std::vector<std::filesystem::path>& images) const;

    /// The same for PNG and JPEG files that are in memory; messages count them from 1.
    Batch decode(const std::vector<std::string_view>& images) const;

    /// Takes pixels that are in memory.
    /// \param pixels RGB, uint8 (B, H, W, 3).
    /// \throws Error pixels of another kind.
    Batch prepare(const Tensor& pixels) const;

    Size size() const { return size_; }

private:
    Batch collect(std::size_t count, const std::function<Tensor(std::size_t)>& pixels_of) const;
    Batch fit(const Tensor& pixels) const;
    void put(const std::byte* pixels, Size size, std::byte* target, int threads) const;
    Tensor empty(std::size_t count) const;

    Port input_;
    Size size_;
    int threads_;
    ImageLimits limits_;
};

}  // namespace neck
