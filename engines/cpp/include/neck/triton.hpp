#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "neck/error.hpp"
#include "neck/export.hpp"
#include "neck/tensor.hpp"

namespace neck {

struct TritonOptions {
    std::chrono::milliseconds connect_timeout{5'000};
    std::chrono::milliseconds timeout{60'000};          ///< of one request, from connecting to the last byte
    std::size_t largest_answer = std::size_t{1} << 32;  ///< bytes; a longer answer is an error

    std::string username{};  ///< for basic authentication; those in the URL are used if there is none here
    std::string password{};
    std::string token{};                                         ///< sent as `Authorization: Bearer TOKEN`
    std::vector<std::pair<std::string, std::string>> headers{};  ///< more headers of every request: name and value
    std::string ca_file{};  ///< certificates that https trusts (PEM); empty: SSL_CERT_FILE, else the system's
};

/// An input of type BYTES: an ensemble's, which takes the bytes of image files.
struct BytesPort {
    std::string name;
    Shape shape;  ///< -1: any
    std::int64_t largest_batch = 1;
};

/// What the server says of a model.
struct TritonModel {
    std::string name;
    std::vector<std::string> versions;
    std::string platform;
    std::vector<Port> inputs;  ///< with the batches that the model's config allows
    std::vector<BytesPort> bytes_inputs;
    std::vector<Port> outputs;
};

/// A client of Triton over HTTP (KServe v2, binary tensors); for one thread at a time, its connection is kept. One that
/// was moved from throws Error. No message has a password, a token or a header's value in it.
class NECK_API TritonClient {
public:
    /// \param url such as `localhost:8000`; `http://` and `https://` may stand before it, and USER:PASSWORD@ before the host.
    /// \throws Error an address or an option that cannot be used.
    explicit TritonClient(std::string url, TritonOptions options = {});
    ~TritonClient();
    TritonClient(TritonClient&&) noexcept;
    TritonClient& operator=(TritonClient&&) noexcept;

    /// The server's address without credentials.
    const std::string& url() const;

    /// \param version of the model; empty: the one that the server chooses.
    /// \throws Error no answer, a refusal in the server's own words, or an answer that is no model's.
    TritonModel model(const std::string& name, const std::string& version = {});

    /// Sends an input and returns the outputs.
    ///
    /// What the model has is asked for once, so that an answer that is not whole is noticed.
    /// \param outputs names; empty: all of the model.
    /// \throws Error as model(), or an answer that lacks an output, has another one, or has one of another type, shape or
    /// batch.
    std::vector<Tensor> infer(const std::string& model, const Tensor& input,
                              const std::vector<std::string>& outputs = {}, const std::string& version = {});

    /// The same with an input of type BYTES (B, 1): each element is the bytes of an image file.
    std::vector<Tensor> infer_bytes(const std::string& model, const std::string& input,
                                    const std::vector<std::string_view>& elements,
                                    const std::vector<std::string>& outputs = {}, const std::string& version = {});

private:
    class Impl;
    Impl& impl() const;
    std::unique_ptr<Impl> impl_;
};

}  // namespace neck
