#include "client/http.hpp"

#include <strings.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <utility>

#include "neck/error.hpp"
#include "files/text.hpp"

namespace neck {
namespace {

constexpr std::size_t largest_description = std::size_t{1} << 24U;  // bytes of a model's config or metadata

struct ListEnd {
    void operator()(curl_slist* list) const { curl_slist_free_all(list); }
};
using List = std::unique_ptr<curl_slist, ListEnd>;

/// Where an answer is written, and how long it may become.
struct Sink {
    Answer answer;
    std::size_t largest = 0;
    bool begun = false;  ///< a line of the answer has come
    bool too_long = false;
    bool no_memory = false;
};

}  // namespace

/// What is sent: JSON, then the tensor where it lies.
struct Http::Source {
    std::array<std::string_view, 2> parts;
    std::size_t sent = 0;
};

namespace {

std::size_t on_body(char* data, std::size_t size, std::size_t count, void* user) {
    Sink& sink = *static_cast<Sink*>(user);
    const std::size_t bytes = size * count;
    if (bytes > sink.largest - sink.answer.body.size()) {
        sink.too_long = true;
        return 0;
    }
    try {
        sink.answer.body.append(data, bytes);
    } catch (...) {  // out of memory: curl stops, no exception may cross it
        sink.no_memory = true;
        return 0;
    }
    return bytes;
}

std::size_t on_header(char* data, std::size_t size, std::size_t count, void* user) {
    Sink& sink = *static_cast<Sink*>(user);
    sink.begun = true;
    const std::string_view line(data, size * count);
    constexpr std::string_view wanted = "inference-header-content-length:";
    if (line.size() > wanted.size() && strncasecmp(line.data(), wanted.data(), wanted.size()) == 0) {
        const std::size_t digits = std::min(line.find_first_not_of(" \t", wanted.size()), line.size());
        std::from_chars(line.data() + digits, line.data() + line.size(), sink.answer.header_length);
    }
    return line.size();
}

std::size_t on_send(char* target, std::size_t size, std::size_t count, void* user) {
    Http::Source& source = *static_cast<Http::Source*>(user);
    std::size_t skip = source.sent;
    for (const std::string_view part : source.parts) {
        if (skip < part.size()) {
            const std::size_t copied = part.copy(target, size * count, skip);
            source.sent += copied;
            return copied;
        }
        skip -= part.size();
    }
    return 0;
}

/// Goes back to the beginning: a kept connection that the server has closed meanwhile is opened anew.
int on_seek(void* user, curl_off_t offset, int origin) {
    if (origin != SEEK_SET || offset < 0) {
        return CURL_SEEKFUNC_CANTSEEK;
    }
    static_cast<Http::Source*>(user)->sent = static_cast<std::size_t>(offset);
    return CURL_SEEKFUNC_OK;
}

using CurlText = std::unique_ptr<char, decltype(&curl_free)>;

const char* checked(const CurlText& text) {
    if (!text) {
        throw std::bad_alloc();
    }
    return text.get();
}

void start_curl() {
    static const CURLcode started = curl_global_init(CURL_GLOBAL_DEFAULT);
    if (started != CURLE_OK) {
        throw Error(std::string("libcurl cannot be initialized (") + curl_easy_strerror(started) +
                    "); check the installation of libcurl");
    }
}

template <typename Value>
void set(CURL* curl, CURLoption option, Value value) {
    const CURLcode code = curl_easy_setopt(curl, option, value);
    if (code != CURLE_OK) {
        throw Error(std::string("libcurl rejected an option (") + curl_easy_strerror(code) +
                    "); install libcurl 7.61 or later with support for HTTPS");
    }
}

/// A header's name or value that cannot begin another line.
bool one_header(std::string_view text) {
    return std::none_of(text.begin(), text.end(), [](unsigned char letter) { return letter < 0x20 || letter == 0x7f; });
}

void check_options(const TritonOptions& options) {
    constexpr std::int64_t longest = std::int64_t{1} << 31;  // milliseconds; curl counts in a long
    for (const auto& [name, time] : {std::pair("timeout", options.timeout), {"connect_timeout", options.connect_timeout}}) {
        if (time.count() < 1 || time.count() >= longest) {
            throw Error(std::string("TritonOptions::") + name + " is " + std::to_string(time.count()) +
                        " ms; set it to a value from 1 to " + std::to_string(longest - 1) + " ms");
        }
    }
    if (options.largest_answer < 1) {
        throw Error("TritonOptions::largest_answer is 0 bytes; set it to 1 byte or more");
    }
    for (const auto& [name, value] : options.headers) {
        constexpr std::string_view more = "!#$%&'*+-.^_`|~";
        const bool token = !name.empty() && std::all_of(name.begin(), name.end(), [&](unsigned char letter) {
            return std::isalnum(letter) != 0 || more.find(static_cast<char>(letter)) != std::string_view::npos;
        });
        if (!token || !one_header(value)) {
            throw Error("the HTTP header " + repr(name) +
                        " is invalid; its name must consist of letters, digits and "
                        "'-', and its value must be one line of text");
        }
    }
    if (!one_header(options.token) || !one_header(options.username)) {
        throw Error(
            "the token or user name for Triton contains control characters, such as a line break; "
            "remove them");
    }
}

std::string remedy(CURLcode code, const TritonOptions& options) {
    switch (code) {
        case CURLE_COULDNT_CONNECT:
        case CURLE_COULDNT_RESOLVE_HOST:
            return "check that the server is running and that the address is correct";
        case CURLE_OPERATION_TIMEDOUT:
            return "the time limit is " + std::to_string(options.connect_timeout.count()) + " ms for connecting and " +
                   std::to_string(options.timeout.count()) +
                   " ms for the whole request. Check that the server can be reached and is not overloaded. To raise "
                   "the limit for the whole request, use the option --timeout of neck-triton or, in C++, "
                   "TritonOptions::timeout";
        case CURLE_PEER_FAILED_VERIFICATION:
        case CURLE_SSL_CACERT_BADFILE:
            return "use --ca FILE or the environment variable SSL_CERT_FILE to pass the certificate of the authority "
                   "that signed the server's certificate";
        case CURLE_URL_MALFORMAT:
        case CURLE_UNSUPPORTED_PROTOCOL:
            return "the server address must look like localhost:8000 or https://triton.example.com";
        default:
            return "check that the server address is the address of Triton's HTTP port, and read the server's log";
    }
}

}  // namespace

Http::Http(std::string url, const TritonOptions& options) : url_(std::move(url)), options_(options) {
    start_curl();
    curl_.reset(curl_easy_init());
    if (!curl_) {
        throw std::bad_alloc();
    }
    take_credentials();
    check_options(options_);
    if (url_.find("://") == std::string::npos) {
        url_ = "http://" + url_;
    }
    while (!url_.empty() && url_.back() == '/') {
        url_.pop_back();
    }
    if (options_.ca_file.empty()) {
        const char* told = std::getenv("SSL_CERT_FILE");  // NOLINT(concurrency-mt-unsafe): read as OpenSSL reads it
        options_.ca_file = told != nullptr ? told : "";
    }
}

/// Takes USER:PASSWORD@ out of the URL, so that no message shows it.
void Http::take_credentials() {
    const std::size_t scheme = url_.find("://");
    const std::size_t host = scheme == std::string::npos ? 0 : scheme + 3;
    const std::size_t end = std::min(url_.find_first_of("/?#", host), url_.size());
    const std::size_t at = url_.substr(0, end).rfind('@');
    std::string credentials;
    if (at != std::string::npos && at >= host) {
        credentials = url_.substr(host, at - host);
        url_.erase(host, at + 1 - host);
    }
    const std::size_t query = url_.find_first_of("?#@", host);  // a token may stand there: it is not shown
    if (query != std::string::npos) {
        const bool hidden = url_.find('@', host) != std::string::npos;  // what stands before may be a password
        throw Error((hidden ? "The server address" : one_line(url_.substr(0, query)) + ": the server address") +
                    " contains the character " + repr(url_.substr(query, 1)) +
                    ", which is not accepted in a host name, port or path. Pass an address such as localhost:8000. If "
                    "the server needs credentials, call neck-triton with the option --user and the environment "
                    "variable NECK_TRITON_PASSWORD, or with the environment variable NECK_TRITON_TOKEN. In C++ code, "
                    "set neck::TritonOptions");
    }
    if (!plain(url_)) {
        throw Error(one_line(url_) +
                    ": the server address contains a single quote, a backslash, a control character or invalid UTF-8. "
                    "Pass an address such as localhost:8000");
    }
    const std::size_t colon = credentials.find(':');
    if (options_.username.empty() && !credentials.empty()) {
        options_.username = unescape(credentials.substr(0, colon));
        options_.password = colon == std::string::npos ? "" : unescape(credentials.substr(colon + 1));
    }
}

std::string Http::unescape(std::string_view text) const {
    int length = 0;
    const CurlText found(curl_easy_unescape(curl_.get(), text.data(), static_cast<int>(text.size()), &length), curl_free);
    return {checked(found), static_cast<std::size_t>(length)};
}

std::string Http::escape(const std::string& part) const {
    const CurlText found(curl_easy_escape(curl_.get(), part.data(), static_cast<int>(part.size())), curl_free);
    return checked(found);
}

Answer Http::perform(const std::string& path, std::vector<std::string> lines, std::size_t largest, Source* source) {
    const auto deadline = std::chrono::steady_clock::now() + options_.timeout;
    CURL* curl = curl_.get();
    if (!options_.token.empty()) {
        lines.push_back("Authorization: Bearer " + options_.token);
    }
    for (const auto& [name, value] : options_.headers) {
        std::string line = name;
        line += value.empty() ? ";" : ": ";  // curl's form of an empty one
        line += value;
        lines.push_back(std::move(line));
    }
    List headers;
    for (const std::string& line : lines) {
        curl_slist* longer = curl_slist_append(headers.get(), line.c_str());
        if (longer == nullptr) {
            throw std::bad_alloc();
        }
        static_cast<void>(headers.release());
        headers.reset(longer);
    }
    Sink sink;
    sink.largest = largest;
    std::array<char, CURL_ERROR_SIZE> reason{};
    const std::string address = url_ + "/" + path;
    set(curl, CURLOPT_URL, address.c_str());
#if LIBCURL_VERSION_NUM >= 0x075500
    set(curl, CURLOPT_PROTOCOLS_STR, "http,https");
#else
    set(curl, CURLOPT_PROTOCOLS, static_cast<long>(CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif
    if (!options_.username.empty()) {
        set(curl, CURLOPT_HTTPAUTH, static_cast<long>(CURLAUTH_BASIC));
        set(curl, CURLOPT_USERNAME, options_.username.c_str());
        set(curl, CURLOPT_PASSWORD, options_.password.c_str());
    }
    if (!options_.ca_file.empty()) {
        set(curl, CURLOPT_CAINFO, options_.ca_file.c_str());
    }
    set(curl, CURLOPT_HTTPHEADER, headers.get());
    set(curl, CURLOPT_NOSIGNAL, 1L);
    set(curl, CURLOPT_ERRORBUFFER, reason.data());
    set(curl, CURLOPT_CONNECTTIMEOUT_MS, static_cast<long>(options_.connect_timeout.count()));
    set(curl, CURLOPT_TIMEOUT_MS, static_cast<long>(options_.timeout.count()));
    set(curl, CURLOPT_WRITEFUNCTION, &on_body);
    set(curl, CURLOPT_WRITEDATA, static_cast<void*>(&sink));
    set(curl, CURLOPT_HEADERFUNCTION, &on_header);
    set(curl, CURLOPT_HEADERDATA, static_cast<void*>(&sink));
    if (source != nullptr) {
        set(curl, CURLOPT_POST, 1L);
        set(curl, CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(source->parts[0].size() + source->parts[1].size()));
        set(curl, CURLOPT_READFUNCTION, &on_send);
        set(curl, CURLOPT_READDATA, static_cast<void*>(source));
        set(curl, CURLOPT_SEEKFUNCTION, &on_seek);
        set(curl, CURLOPT_SEEKDATA, static_cast<void*>(source));
    }
    CURLcode code = curl_easy_perform(curl);
    long opened = 0;
    curl_easy_getinfo(curl, CURLINFO_NUM_CONNECTS, &opened);
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    if (code == CURLE_SEND_ERROR && opened == 0 && !sink.begun && left.count() > 0 && source != nullptr) {
        // the server closed the kept connection while it was written to; if that is seen later curl itself sends again
        source->sent = 0;
        set(curl, CURLOPT_FRESH_CONNECT, 1L);
        set(curl, CURLOPT_TIMEOUT_MS, static_cast<long>(left.count()));
        code = curl_easy_perform(curl);
    }
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &sink.answer.status);
    curl_easy_reset(curl);  // the pointers above go with this call; the connection stays
    if (sink.no_memory || code == CURLE_OUT_OF_MEMORY) {
        throw MemoryError(address +
                          ": this machine has too little free memory for the server's answer; request fewer "
                          "outputs or images, or close other programs on this machine");
    }
    if (sink.too_long) {
        if (source != nullptr) {
            throw Error(address + ": the server's answer is longer than the limit of " + std::to_string(largest) +
                        " bytes. Request fewer outputs, send fewer images per request, or raise the limit with the "
                        "option --largest-answer of neck-triton or, in C++, with TritonOptions::largest_answer");
        }
        throw Error(address + ": the server's answer is longer than " + std::to_string(largest) +
                    " bytes, the limit for the description of a model. Check that " + url_ +
                    " is the address of Triton's HTTP port");
    }
    if (code != CURLE_OK) {
        const std::string told = reason[0] != '\0' ? reason.data() : curl_easy_strerror(code);
        throw Error(address + ": " + one_line(told) + "; " + remedy(code, options_));
    }
    return std::move(sink.answer);
}

Answer Http::get(const std::string& path) {
    return perform(path, {}, std::min(options_.largest_answer, largest_description), nullptr);
}

Answer Http::post(const std::string& path, const std::string& json, std::string_view bytes) {
    Source source{{json, bytes}};
    // without "Expect:" curl waits a second for a go-ahead that Triton does not give
    return perform(path,
                   {"Inference-Header-Content-Length: " + std::to_string(json.size()),
                    "Content-Type: application/octet-stream", "Expect:"},
                   options_.largest_answer, &source);
}

}  // namespace neck
