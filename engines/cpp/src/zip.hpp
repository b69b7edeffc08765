#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace neck {

/// Why a file is no .npz of ours; the file's name is put before it where it is caught.
struct NpzFault {
    std::string why;
};

/// Little-endian numbers of a file; nothing beyond its end is ever read.
class Bytes {
public:
    explicit Bytes(std::string_view text) : text_(text) {}

    /// \throws NpzFault the file ends before.
    std::uint64_t number(std::uint64_t at, std::size_t count) const;

    /// \throws NpzFault the file ends before.
    std::string_view cut(std::uint64_t at, std::uint64_t count) const;

    std::uint64_t size() const { return text_.size(); }
    std::string_view text() const { return text_; }

private:
    std::string_view text_;
};

/// What the zip file's directory says of a member.
struct Member {
    std::string name;
    std::uint64_t method = 0;
    std::uint64_t flags = 0;
    std::uint64_t crc = 0;
    std::uint64_t packed = 0;
    std::uint64_t size = 0;
    std::uint64_t header = 0;
};

/// Lists the members of a zip file.
/// \throws NpzFault it is none, or damaged.
std::vector<Member> list_members(const Bytes& file);

/// The bytes of a member, its CRC checked.
/// \throws NpzFault compressed, encrypted or damaged.
std::string_view content_of(const Bytes& file, const Member& member);

}  // namespace neck
