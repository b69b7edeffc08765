#pragma once

#include <cstdint>

/// The structures of DLPack 0.8, in which PyTorch, CuPy, JAX and others hand tensors over: those of its dlpack.h, byte
/// for byte, so that a pointer to Managed is a DLManagedTensor*. (github.com/dmlc/dlpack)
namespace neck::dlpack {

struct Device {
    std::int32_t type = 2;  ///< kDLCUDA
    std::int32_t id = 0;
};

struct Type {
    std::uint8_t code = 0;  ///< 0 signed, 1 unsigned, 2 float, 4 bfloat16
    std::uint8_t bits = 0;
    std::uint16_t lanes = 1;
};

struct Tensor {
    void* data = nullptr;
    Device device;
    std::int32_t ndim = 0;
    Type dtype;
    std::int64_t* shape = nullptr;
    std::int64_t* strides = nullptr;  ///< nullptr: contiguous
    std::uint64_t byte_offset = 0;
};

struct Managed {
    Tensor dl_tensor;
    void* manager_ctx = nullptr;
    void (*deleter)(Managed* self) = nullptr;  ///< called once, by who took it
};

}  // namespace neck::dlpack
