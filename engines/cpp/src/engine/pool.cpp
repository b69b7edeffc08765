#include "neck/pool.hpp"

#include <algorithm>
#include <condition_variable>
#include <list>
#include <mutex>
#include <utility>
#include <vector>

#include "files/guard.hpp"
#include "gpu/cuda.hpp"
#include "files/text.hpp"

namespace neck {
namespace {

constexpr int most_contexts = 1024;

/// How many contexts fit into the memory that is free, the first of them made already.
void check_memory(const std::string& plan, const Engine& first, int contexts) {
    std::size_t free_bytes = 0;
    std::size_t total = 0;
    check(cudaMemGetInfo(&free_bytes, &total), plan + ": querying the free device memory failed");
    const std::size_t each = std::max<std::size_t>(1, first.context_bytes());
    const std::size_t more = static_cast<std::size_t>(contexts) - 1;
    if (more > free_bytes / each) {
        throw Error(
            plan + format(": %d contexts need another %.1f MB of device memory, but only %.1f MB are free; use at most "
                          "%zu contexts, or reduce max_batch",
                          contexts, static_cast<double>(more * each) / 1e6, static_cast<double>(free_bytes) / 1e6,
                          1 + free_bytes / each));
    }
}

}  // namespace

class Pool::State {
public:
    State(const std::filesystem::path& plan, const PoolOptions& options, const EngineOptions& engine)
        : plan_(plan.string()), device_(engine.device), most_waiting_(options.most_waiting) {
        if (options.contexts < 1 || options.contexts > most_contexts) {
            throw Error(plan_ + ": a pool cannot have " + std::to_string(options.contexts) +
                        " contexts; set PoolOptions::contexts to a number from 1 to " + std::to_string(most_contexts));
        }
        engines_.emplace_back(plan, engine);
        const DeviceGuard guard(device_, plan_);
        check_memory(plan_, engines_.front(), options.contexts);
        free_.reserve(static_cast<std::size_t>(options.contexts));  // what goes back allocates nothing
        for (int index = 0; index < options.contexts; ++index) {
            if (index > 0) {
                engines_.push_back(engines_.front().another());
            }
            streams_.push_back(make_stream(plan_ + ": creating a CUDA stream failed"));
            free_.push_back(static_cast<std::size_t>(index));
        }
    }

    /// Waits for a context; one whose GPU calls failed is made anew first.
    std::size_t acquire(std::chrono::milliseconds timeout) {
        const std::size_t index = wait_for_one(timeout);
        try {
            if (engines_[index].failed()) {
                engines_[index].recover();
            }
        } catch (...) {
            give_back(index);
            throw;
        }
        return index;
    }

    void give_back(std::size_t index) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto next =
            std::find_if(waiting_.begin(), waiting_.end(), [](const Waiter& waiter) { return !waiter.granted; });
        if (next == waiting_.end() || closed_) {
            free_.push_back(index);
            return;
        }
        next->granted = true;
        next->index = index;
        next->changed.notify_one();
    }

    void close() {
        const std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
        for (Waiter& waiter : waiting_) {
            waiter.changed.notify_one();
        }
    }

    std::size_t waiting() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return waiting_.size();
    }

    Engine& engine(std::size_t index) { return engines_[index]; }
    Stream stream(std::size_t index) const { return streams_[index].get(); }
    int contexts() const { return static_cast<int>(engines_.size()); }
    const std::string& plan() const { return plan_; }

private:
    struct Waiter {
        bool granted = false;
        std::size_t index = 0;
        std::condition_variable changed{};
    };

    std::size_t wait_for_one(std::chrono::milliseconds timeout) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!closed_ && !free_.empty()) {  // then nobody waits
            const std::size_t index = free_.back();
            free_.pop_back();
            return index;
        }
        if (!closed_ && waiting_.size() >= most_waiting_) {
            throw Error(plan_ + ": " + std::to_string(waiting_.size()) + " threads are already waiting for one of " +
                        std::to_string(engines_.size()) + " contexts; try again later, or create a larger pool");
        }
        const auto self = waiting_.emplace(waiting_.end());
        constexpr std::chrono::milliseconds longest = std::chrono::hours(24 * 365);  // the clock ends somewhere
        const bool done =
            self->changed.wait_for(lock, std::min(timeout, longest), [&] { return self->granted || closed_; });
        const bool granted = self->granted;
        const std::size_t index = self->index;
        waiting_.erase(self);
        if (granted) {
            return index;
        }
        if (done) {
            throw Error(plan_ + ": the pool of contexts is closed; create another pool");
        }
        throw Error(plan_ + ": none of the " + std::to_string(engines_.size()) + " contexts became free within " +
                    std::to_string(timeout.count()) + " ms; use a longer timeout, or create a larger pool");
    }

    std::string plan_;
    int device_;
    std::size_t most_waiting_;
    std::vector<OwnedStream> streams_;
    std::vector<Engine> engines_;
    std::mutex mutex_;
    std::vector<std::size_t> free_;
    std::list<Waiter> waiting_;  // the first came first
    bool closed_ = false;
};

Pool::Lease::Lease(std::shared_ptr<State> state, std::size_t index) : state_(std::move(state)), index_(index) {}
Pool::Lease::Lease(Lease&&) noexcept = default;
Pool::Lease& Pool::Lease::operator=(Lease&& other) noexcept {
    if (this != &other) {
        give_back();
        state_ = std::move(other.state_);
        index_ = other.index_;
    }
    return *this;
}
Pool::Lease::~Lease() { give_back(); }

void Pool::Lease::give_back() noexcept {
    if (state_) {
        state_->engine(index_).unbind_outputs();
        state_->give_back(index_);
        state_.reset();
    }
}

Pool::State& Pool::Lease::state() const {
    if (!state_) {
        throw Error("this neck::Pool::Lease was moved from; use the lease that it was moved to");
    }
    return *state_;
}

Engine& Pool::Lease::operator*() const { return state().engine(index_); }
Stream Pool::Lease::stream() const { return state().stream(index_); }

Pool::Pool(const std::filesystem::path& plan, const PoolOptions& options, const EngineOptions& engine)
    : state_(guarded(plan, [&] { return std::make_shared<State>(plan, options, engine); })) {}
Pool::~Pool() { close(); }

Pool::Lease Pool::acquire(std::chrono::milliseconds timeout) {
    return guarded(state_->plan(), [&] { return Lease(state_, state_->acquire(timeout)); });
}
void Pool::close() { state_->close(); }
int Pool::contexts() const { return state_->contexts(); }
std::size_t Pool::waiting() const { return state_->waiting(); }
std::size_t Pool::context_bytes() const { return state_->engine(0).context_bytes(); }

}  // namespace neck
