#include "client/http.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <utility>

#include "neck/error.hpp"
#include "files/text.hpp"

namespace neck {
namespace {

struct ListEnd {
    void operator()(curl_slist* list) const { curl_slist_free_all(list); }
};
using List = std::unique_ptr<curl_slist, ListEnd>;

/// Where an answer is written, and how long it may become.
struct Sink {
    Answer answer;
    std::size_t largest = 0;
    bool too_long = false;
};

/// What is sent: JSON, then the tensor where it lies.
struct Source {
    std::array<std::string_view, 2> parts;
    std::size_t sent = 0;
};

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
        sink.too_long = true;
        return 0;
    }
    return bytes;
}

std::size_t on_header(char* data, std::size_t size, std::size_t count, void* user) {
    Sink& sink = *static_cast<Sink*>(user);
    const std::string_view line(data, size * count);
    constexpr std::string_view wanted = "inference-header-content-length:";
    const bool same = line.size() > wanted.size() &&
                      std::equal(wanted.begin(), wanted.end(), line.begin(), [](char letter, char found) {
                          return letter == (found >= 'A' && found <= 'Z' ? static_cast<char>(found + 32) : found);
                      });
    if (same) {
        const std::size_t digits = std::min(line.find_first_not_of(" \t", wanted.size()), line.size());
        std::from_chars(line.data() + digits, line.data() + line.size(), sink.answer.header_length);
    }
    return line.size();
}

std::size_t on_send(char* target, std::size_t size, std::size_t count, void* user) {
    Source& source = *static_cast<Source*>(user);
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
    static_cast<Source*>(user)->sent = static_cast<std::size_t>(offset);
    return CURL_SEEKFUNC_OK;
}

void start_curl() {
    static const CURLcode started = curl_global_init(CURL_GLOBAL_DEFAULT);
    if (started != CURLE_OK) {
        throw Error(std::string("libcurl cannot start (") + curl_easy_strerror(started) + ")");
    }
}

template <typename Value>
void set(CURL* curl, CURLoption option, Value value) {
    const CURLcode code = curl_easy_setopt(curl, option, value);
    if (code != CURLE_OK) {
        throw Error(std::string("libcurl refuses a setting (") + curl_easy_strerror(code) + ")");
    }
}

std::string remedy(CURLcode code, const TritonOptions& options) {
    switch (code) {
        case CURLE_COULDNT_CONNECT:
        case CURLE_COULDNT_RESOLVE_HOST:
            return "is the server up, and the address right?";
        case CURLE_OPERATION_TIMEDOUT:
            return "nothing whole came within " + std::to_string(options.timeout.count()) +
                   " ms; is the server overloaded, or the timeout too short?";
        case CURLE_URL_MALFORMAT:
        case CURLE_UNSUPPORTED_PROTOCOL:
            return "expected an address such as localhost:8000";
        default:
            return "does Triton's HTTP port answer there? its log may tell more";
    }
}

}  // namespace

Http::Http(std::string url, const TritonOptions& options) : url_(std::move(url)), options_(options) {
    start_curl();
    if (url_.find("://") == std::string::npos) {
        url_ = "http://" + url_;
    }
    while (!url_.empty() && url_.back() == '/') {
        url_.pop_back();
    }
    curl_.reset(curl_easy_init());
    if (!curl_) {
        throw Error("libcurl cannot start; is memory left?");
    }
}

Answer Http::perform(const std::string& path, curl_slist* headers) {
    CURL* curl = curl_.get();
    Sink sink;
    sink.largest = options_.largest_answer;
    std::array<char, CURL_ERROR_SIZE> reason{};
    const std::string address = url_ + "/" + path;
    set(curl, CURLOPT_URL, address.c_str());
#if LIBCURL_VERSION_NUM >= 0x075500
    set(curl, CURLOPT_PROTOCOLS_STR, "http,https");
#else
    set(curl, CURLOPT_PROTOCOLS, static_cast<long>(CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif
    set(curl, CURLOPT_HTTPHEADER, headers);
    set(curl, CURLOPT_NOSIGNAL, 1L);
    set(curl, CURLOPT_ERRORBUFFER, reason.data());
    set(curl, CURLOPT_CONNECTTIMEOUT_MS, static_cast<long>(options_.connect_timeout.count()));
    set(curl, CURLOPT_TIMEOUT_MS, static_cast<long>(options_.timeout.count()));
    set(curl, CURLOPT_WRITEFUNCTION, &on_body);
    set(curl, CURLOPT_WRITEDATA, static_cast<void*>(&sink));
    set(curl, CURLOPT_HEADERFUNCTION, &on_header);
    set(curl, CURLOPT_HEADERDATA, static_cast<void*>(&sink));
    const CURLcode code = curl_easy_perform(curl);
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &sink.answer.status);
    curl_easy_reset(curl);  // the pointers above go with this call; the connection stays
    if (sink.too_long) {
        throw Error(address + ": the answer is longer than " + std::to_string(options_.largest_answer) +
                    " bytes; ask for fewer outputs, or allow more");
    }
    if (code != CURLE_OK) {
        const std::string told = reason[0] != '\0' ? reason.data() : curl_easy_strerror(code);
        throw Error(address + ": " + one_line(told) + "; " + remedy(code, options_));
    }
    return std::move(sink.answer);
}

Answer Http::get(const std::string& path) {
    set(curl_.get(), CURLOPT_HTTPGET, 1L);
    return perform(path, nullptr);
}

Answer Http::post(const std::string& path, const std::string& json, const std::vector<std::byte>& bytes) {
    Source source{{json, {reinterpret_cast<const char*>(bytes.data()), bytes.size()}}};
    const std::size_t total = json.size() + bytes.size();
    List headers;
    // without "Expect:" curl waits a second for a go-ahead that Triton does not give
    for (const std::string& line : {"Inference-Header-Content-Length: " + std::to_string(json.size()),
                                    std::string("Content-Type: application/octet-stream"), std::string("Expect:")}) {
        curl_slist* longer = curl_slist_append(headers.get(), line.c_str());
        if (longer == nullptr) {
            throw Error("libcurl is out of memory");
        }
        static_cast<void>(headers.release());
        headers.reset(longer);
    }
    set(curl_.get(), CURLOPT_POST, 1L);
    set(curl_.get(), CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(total));
    set(curl_.get(), CURLOPT_READFUNCTION, &on_send);
    set(curl_.get(), CURLOPT_READDATA, static_cast<void*>(&source));
    set(curl_.get(), CURLOPT_SEEKFUNCTION, &on_seek);
    set(curl_.get(), CURLOPT_SEEKDATA, static_cast<void*>(&source));
    return perform(path, headers.get());
}

std::string Http::escape(const std::string& part) const {
    struct Free {
        void operator()(char* text) const { curl_free(text); }
    };
    const std::unique_ptr<char, Free> text(curl_easy_escape(curl_.get(), part.data(), static_cast<int>(part.size())));
    if (!text) {
        throw Error("libcurl is out of memory");
    }
    return text.get();
}

}  // namespace neck
