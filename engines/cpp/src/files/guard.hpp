#pragma once

#include <exception>
#include <filesystem>
#include <new>
#include <string>
#include <system_error>

#include "neck/error.hpp"
#include "files/text.hpp"

namespace neck {

inline const std::string& subject_text(const std::string& subject) { return subject; }
inline std::string subject_text(const char* subject) { return subject; }
inline std::string subject_text(const std::filesystem::path& subject) { return subject.string(); }

/// Does work of the public interface, which throws nothing but Error.
/// \param subject begins the message: a file, a plan or an address; it is made a text only for that.
template <typename Subject, typename Work>
auto guarded(const Subject& subject, Work work) -> decltype(work()) {
    try {
        return work();
    } catch (const Error&) {
        throw;
    } catch (const std::bad_alloc&) {
        throw MemoryError(subject_text(subject) +
                          ": this machine has too little free memory; close other programs, or use "
                          "smaller images, batches or files");
    } catch (const std::system_error& error) {
        throw Error(subject_text(subject) + ": the operating system refused a resource (" + one_line(error.what()) +
                    "); check the limits on threads, open files and memory (ulimit -a)");
    } catch (const std::exception& error) {
        throw Error(subject_text(subject) + ": unexpected error (" + one_line(error.what()) + "); please report it");
    }
}

}  // namespace neck
