// The resize kernel's body against neck::Preprocessor: as plain C++ here, by a GPU in real_cuda/test_resize.cpp.
#pragma once

#include <functional>

#include "gpu/device_resize.hpp"
#include "neck/image.hpp"

/// Pixels without order; uint8 (1, H, W, 3).
neck::Tensor colors_of(neck::Size size);

/// Bytes of a job's target.
std::size_t target_bytes(const neck::DeviceResize& job);

/// \param run does a job whose addresses are the host's.
void test_resizes(const std::function<void(const neck::DeviceResize&)>& run);
