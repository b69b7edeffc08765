// The parts of neck-tests; main.cpp says how each is called.
#pragma once

#include <chrono>
#include <string>

void test_engine(const std::string& plan);
void test_pool(const std::string& plan, int threads, int requests, std::chrono::seconds least);

/// Two threads use one context at a time, as they would by a pool that is broken; the fake ends the program. Where
/// it does not see it, five minutes.
void share_a_context(const std::string& plan);

/// What is refused; `folder` is written to.
void test_checks(const std::string& plan, const std::string& folder);

/// \return the exit status.
int probe(int count, char** values);
