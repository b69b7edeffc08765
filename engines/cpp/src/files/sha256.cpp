#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>

#include "files/files.hpp"
#include "neck/error.hpp"

namespace neck {

namespace {

constexpr std::size_t piece = std::size_t{1} << 20U;

struct DigestEnd {
    void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
};

/// SHA-256 of what is added piece by piece.
class Sha256 {
public:
    Sha256() : context_(EVP_MD_CTX_new()) {
        if (!context_) {
            throw std::bad_alloc();
        }
        check(EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr));
    }

    void add(const std::byte* data, std::size_t size) { check(EVP_DigestUpdate(context_.get(), data, size)); }

    /// 64 hexadecimal digits.
    std::string digits() {
        std::array<unsigned char, 32> digest{};
        check(EVP_DigestFinal_ex(context_.get(), digest.data(), nullptr));
        std::string text;
        for (const unsigned char byte : digest) {
            text += "0123456789abcdef"[byte >> 4U];
            text += "0123456789abcdef"[byte & 15U];
        }
        return text;
    }

private:
    static void check(int done) {
        if (done != 1) {
            throw Error("OpenSSL cannot compute SHA-256; check its configuration (openssl list -digest-algorithms)");
        }
    }

    std::unique_ptr<EVP_MD_CTX, DigestEnd> context_;
};

}  // namespace

std::string sha256(const std::byte* data, std::size_t size) {
    Sha256 sum;
    sum.add(data, size);
    return sum.digits();
}

std::string sha256_of_file(const std::filesystem::path& path) {
    OpenFile file(path);
    FileBytes part(std::min(piece, file.size()));
    Sha256 sum;
    for (std::size_t rest = file.size(); rest > 0;) {
        const std::size_t bytes = std::min(rest, part.size());
        file.read(part.data(), bytes);
        sum.add(part.data(), bytes);
        rest -= bytes;
    }
    return sum.digits();
}

}  // namespace neck
