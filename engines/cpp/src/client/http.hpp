#pragma once

#include <curl/curl.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "neck/triton.hpp"

namespace neck {

/// What a server answered; the status is any.
struct Answer {
    long status = 0;
    std::string body;
    std::size_t header_length = 0;  ///< of the JSON before binary tensors; 0: not told
};

/// HTTP to one server by libcurl; its connection is kept from call to call. If the server closes a kept
/// connection before anything of an answer has come, the request is sent once more on a new one, within the timeout.
class Http {
public:
    struct Source;

    Http(std::string url, const TritonOptions& options);

    /// Without credentials.
    const std::string& url() const { return url_; }

    /// \throws Error the server cannot be reached, is too slow, or breaks off.
    Answer get(const std::string& path);

    /// Sends JSON, then bytes.
    Answer post(const std::string& path, const std::string& json, std::string_view bytes);

    /// A part of a path, with all that is special in one escaped.
    std::string escape(const std::string& part) const;

private:
    struct CurlEnd {
        void operator()(CURL* handle) const { curl_easy_cleanup(handle); }
    };
    Answer perform(const std::string& path, std::vector<std::string> lines, std::size_t largest, Source* source);
    void take_credentials();
    std::string unescape(std::string_view text) const;

    std::string url_;
    TritonOptions options_;
    std::unique_ptr<CURL, CurlEnd> curl_;
};

}  // namespace neck
