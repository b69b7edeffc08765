#pragma once

#include <functional>
#include <string>

#include "neck/export.hpp"

namespace neck {

enum class LogLevel { warning, error };

/// Receives one line of text without its end of line.
using LogSink = std::function<void(LogLevel, const std::string&)>;

/// Sets where the library reports what is no error of a call: damaged data that a decoder filled in, TensorRT's warnings
/// and errors, a runtime cache that cannot be used. Without a sink these lines are dropped; an empty one removes the sink.
///
/// The sink may be called from any thread, from several at the same time, and until set_log returns also from threads
/// that use the old one. What it throws is ignored.
NECK_API void set_log(LogSink sink);

}  // namespace neck
