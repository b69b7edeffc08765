#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "neck/error.hpp"
#include "neck/tensor.hpp"

namespace neck {

struct TritonOptions {
    std::chrono::milliseconds connect_timeout{5'000};
    std::chrono::milliseconds timeout{60'000};          ///< of one request, from connecting to the last byte
    std::size_t largest_answer = std::size_t{1} << 32;  ///< bytes; a longer answer is an error
};

/// What the server says of a model.
struct TritonModel {
    std::string name;
    std::vector<std::string> versions;
    std::string platform;
    std::vector<Port> inputs;  ///< with the batches that the model's config allows
    std::vector<Port> outputs;
};

/// A client of Triton over HTTP (KServe v2, binary tensors); for one thread at a time, its connection is kept.
class TritonClient {
public:
    /// \param url such as `localhost:8000`; `http://` and `https://` may stand before it.
    explicit TritonClient(std::string url, TritonOptions options = {});
    ~TritonClient();
    TritonClient(TritonClient&&) noexcept;
    TritonClient& operator=(TritonClient&&) noexcept;

    /// \param version of the model; empty: the one that the server chooses.
    /// \throws Error no answer, a refusal in the server's own words, or an answer that is no model's.
    TritonModel model(const std::string& name, const std::string& version = {});

    /// Sends an input and returns the outputs.
    /// \param outputs names; empty: all of the model.
    /// \throws Error as model(), or outputs that are not whole.
    std::vector<Tensor> infer(const std::string& model, const Tensor& input,
                              const std::vector<std::string>& outputs = {}, const std::string& version = {});

private:
    class Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace neck
