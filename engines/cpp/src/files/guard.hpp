#pragma once

#include <exception>
#include <new>
#include <string>
#include <system_error>

#include "neck/error.hpp"
#include "files/text.hpp"

namespace neck {

/// Does work of the public interface, which throws nothing but Error.
/// \param subject begins the message: a file, a plan or an address.
template <typename Work>
auto guarded(const std::string& subject, Work work) -> decltype(work()) {
    try {
        return work();
    } catch (const Error&) {
        throw;
    } catch (const std::bad_alloc&) {
        throw MemoryError(subject + ": the host has too little free memory for this; end other programs, or use " +
                          "smaller pictures, batches or files");
    } catch (const std::system_error& error) {
        throw Error(subject + ": the operating system refuses (" + one_line(error.what()) +
                    "); check the limits of this process on threads, open files and memory");
    } catch (const std::exception& error) {
        throw Error(subject + ": unexpected failure (" + one_line(error.what()) + "); please report it");
    }
}

}  // namespace neck
