#pragma once

#include <cstddef>
#include <functional>

/// Does work again and again, of whose allocations the first fails, then the second, and so on until none is left; prints
/// how many failed, and how many of them came out as a neck::MemoryError.
/// \param least bytes of an allocation that may fail.
void fail_every_allocation(std::size_t least, const std::function<void()>& work);

/// Resizes by four threads in a process that may start none; prints what comes of it.
void refuse_threads();
