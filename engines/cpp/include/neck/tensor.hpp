#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "neck/export.hpp"

namespace neck {

enum class DataType { float32, float16, bfloat16, uint8, int32, int64 };

/// Sides of a tensor, the batch first; -1 is a dynamic batch.
using Shape = std::vector<std::int64_t>;

/// numpy's name, such as `float32`.
NECK_API std::string_view name_of(DataType type);

/// The type of numpy's name; empty where it is none of ours.
NECK_API std::optional<DataType> type_of(std::string_view name);

/// Bytes of one element.
NECK_API std::size_t size_of(DataType type);

/// `(1, 3, 1008, 1008)`, as Python writes it.
NECK_API std::string to_text(const Shape& shape);

/// Bytes of a tensor.
/// \throws Error a negative side, or more bytes than an address can count.
NECK_API std::size_t bytes_of(DataType type, const Shape& shape);

/// A tensor in host memory, contiguous, little-endian.
///
/// Its members may be changed; what takes a tensor checks again that its data are those of its shape.
struct NECK_API Tensor {
    std::string name;
    DataType type = DataType::float32;
    Shape shape{0};
    std::vector<std::byte> data;

    /// Without elements.
    Tensor() = default;

    /// \param data of the type and shape; none: they are filled in later.
    /// \throws Error data of another size.
    Tensor(std::string name, DataType type, Shape shape, std::vector<std::byte> data);

    /// All zero.
    /// \throws Error as bytes_of.
    Tensor(std::string name, DataType type, Shape shape);

    /// \throws Error as making it.
    void check() const;

    /// `float32 (1, 3, 1008, 1008)`
    std::string describe() const;

    /// Its elements as float32; every float16 and bfloat16 is one.
    std::vector<float> to_floats() const;

    /// Entries first .. first + count of the first side, under the same name.
    /// \throws Error there are none, or as check().
    Tensor slice(std::int64_t first, std::int64_t count) const;
};

/// One element of IEEE half precision.
NECK_API float half_to_float(std::uint16_t bits);

/// An input or output of an engine: its shape, -1 for a dynamic batch, and the batches that it takes.
struct NECK_API Port {
    std::string name;
    DataType type = DataType::float32;
    Shape shape;
    std::int64_t smallest_batch = 1;
    std::int64_t optimum_batch = 1;
    std::int64_t largest_batch = 1;

    /// `image: float32 (1 to 8, 3, 1008, 1008)`
    std::string describe() const;

    /// Its shape at a batch.
    Shape at(std::int64_t batch) const;
};

}  // namespace neck
