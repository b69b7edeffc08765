#pragma once

#include <chrono>
#include <cstddef>
#include <filesystem>
#include <memory>

#include "neck/engine.hpp"

namespace neck {

struct PoolOptions {
    int contexts = 2;                ///< runs that may be at work at the same time
    std::size_t most_waiting = 256;  ///< threads that may wait for one; the next is refused at once
};

/// Several contexts of one engine for many threads: the weights are in device memory once.
///
/// Who asks first is served first. All methods may be called from any thread.
class NECK_API Pool {
    class State;

public:
    /// The right to use one context; it goes back when this ends, by whatever way, and with it memory that was bound to
    /// outputs: it waits for a run that writes there. One that was moved from throws Error.
    class NECK_API Lease {
    public:
        Lease(Lease&&) noexcept;
        Lease& operator=(Lease&&) noexcept;
        ~Lease();

        Engine& operator*() const;
        Engine* operator->() const { return &**this; }

        /// A stream of this context's own, so that runs of several contexts overlap.
        Stream stream() const;

    private:
        friend class Pool;
        Lease(std::shared_ptr<State> state, std::size_t index);
        void give_back() noexcept;
        State& state() const;

        std::shared_ptr<State> state_;
        std::size_t index_ = 0;
    };

    /// Loads the plan, says no where the contexts do not fit into device memory, then makes them.
    /// \throws Error as Engine, a number of contexts that is not 1 to 1024, or too little memory and how many would
    /// fit.
    explicit Pool(const std::filesystem::path& plan, const PoolOptions& options = {}, const EngineOptions& engine = {});

    /// As close(). Memory is freed when the last lease has gone back.
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    /// Waits for a context. One in which a call of CUDA or TensorRT failed before is made anew first.
    /// \throws Error none came free in time, too many wait already, the pool was closed, or the context cannot be made.
    Lease acquire(std::chrono::milliseconds timeout);

    /// Refuses who waits and who comes; leases that are out stay good.
    void close();

    int contexts() const;

    /// Threads that wait in acquire() now.
    std::size_t waiting() const;

    /// Device memory of each context, beside the weights.
    std::size_t context_bytes() const;

private:
    std::shared_ptr<State> state_;
};

}  // namespace neck
