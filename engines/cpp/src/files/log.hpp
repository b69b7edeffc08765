#pragma once

#include <string>

#include "neck/log.hpp"

namespace neck {

/// Gives a line to the sink of set_log. It throws nothing: libjpeg, CUDA's and TensorRT's threads call it.
NECK_API void log_line(LogLevel level, const std::string& line) noexcept;

}  // namespace neck
