#include <openssl/evp.h>

#include <array>
#include <memory>

#include "files/files.hpp"
#include "neck/error.hpp"

namespace neck {

std::string sha256(const std::byte* data, std::size_t size) {
    std::array<unsigned char, 32> digest{};
    if (EVP_Digest(data, size, digest.data(), nullptr, EVP_sha256(), nullptr) != 1) {
        throw Error("OpenSSL computes no SHA-256 here; check its configuration (openssl list -digest-algorithms)");
    }
    std::string text;
    for (const unsigned char byte : digest) {
        text += "0123456789abcdef"[byte >> 4U];
        text += "0123456789abcdef"[byte & 15U];
    }
    return text;
}

}  // namespace neck
