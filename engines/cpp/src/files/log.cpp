#include "files/log.hpp"

#include <memory>
#include <mutex>
#include <utility>

namespace neck {
namespace {

std::mutex& guard() {
    static std::mutex only;
    return only;
}

std::shared_ptr<const LogSink>& current() {
    static std::shared_ptr<const LogSink> only;
    return only;
}

}  // namespace

void set_log(LogSink sink) {
    std::shared_ptr<const LogSink> next = sink ? std::make_shared<const LogSink>(std::move(sink)) : nullptr;
    const std::lock_guard<std::mutex> lock(guard());
    current().swap(next);
}

void log_line(LogLevel level, const std::string& line) noexcept {
    try {
        std::shared_ptr<const LogSink> sink;
        {
            const std::lock_guard<std::mutex> lock(guard());
            sink = current();
        }
        if (sink) {
            (*sink)(level, line);
        }
    } catch (...) {  // NOLINT(bugprone-empty-catch): a line of the log is lost, no more
    }
}

}  // namespace neck
