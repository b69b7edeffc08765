// Runs of a plan that hold on the fake of CUDA and on CUDA itself. The plan: float32 (1 to 4, 3, 2, 2) in; `half`,
// float16, and `full`, float32, of 5 channels out.
#pragma once

#include <chrono>
#include <string>

/// Batches, and the order of copies and runs over two streams and the null stream.
void test_batches(const std::string& plan, bool graph);

/// An input in the caller's device memory, aligned or not; an engine that is moved and replaced.
void test_callers_memory(const std::string& plan, bool graph);

/// Outputs in the caller's device memory; another stream waits for finished().
void test_bound_outputs(const std::string& plan, bool graph);

/// Outputs handed over without a copy, which outlive the engine.
void test_dlpack(const std::string& plan);

/// Every request is answered, rightly, and every third ends by an exception that gives the context back.
void test_many_threads(const std::string& plan, int contexts, int threads, int requests, std::chrono::seconds least);
