#pragma once

#include <stdexcept>

namespace neck {

/// The one exception of this library; its message says what, what it got, what it expected and what to do.
class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

}  // namespace neck
