#pragma once

#include <stdexcept>

#include "neck/export.hpp"

namespace neck {

/// What every function of this library throws if it fails; the message says what failed, what was expected and what to
/// do.
class NECK_API Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

/// Host memory ran out. The file or image that the message names may be intact.
class NECK_API MemoryError : public Error {
public:
    using Error::Error;
};

}  // namespace neck
