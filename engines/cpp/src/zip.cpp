#include "zip.hpp"

#include <zlib.h>

#include <utility>

#include "text.hpp"

namespace neck {
namespace {

constexpr std::uint32_t large = 0xffffffffU;  // the true figure is in a zip64 field

struct Directory {
    std::uint64_t entries = 0;
    std::uint64_t offset = 0;
};

Directory find_directory(const Bytes& file) {
    const std::size_t end = file.text().rfind(std::string_view("PK\5\6", 4));
    if (end == std::string_view::npos || file.text().substr(0, 2) != "PK") {
        throw NpzFault{"is no .npz file, or its end is missing"};
    }
    Directory directory{file.number(end + 10, 2), file.number(end + 16, 4)};
    if ((directory.entries == 0xffff || directory.offset == large) && end >= 20 &&
        file.number(end - 20, 4) == 0x07064b50) {
        const std::uint64_t record = file.number(end - 20 + 8, 8);
        if (file.number(record, 4) != 0x06064b50) {
            throw NpzFault{"is damaged: its zip64 directory is not where it should be"};
        }
        directory = {file.number(record + 32, 8), file.number(record + 48, 8)};
    }
    return directory;
}

/// Replaces the figures that did not fit into 32 bits by those of the zip64 field.
void read_zip64(const Bytes& file, Member& member, std::uint64_t at, std::uint64_t end) {
    while (end - at >= 4) {
        const std::uint64_t kind = file.number(at, 2);
        const std::uint64_t length = file.number(at + 2, 2);
        std::uint64_t field = at + 4;
        at = field + length;
        if (at > end) {
            return;
        }
        for (std::uint64_t* figure : {&member.size, &member.packed, &member.header}) {
            if (kind == 1 && *figure == large && field + 8 <= at) {
                *figure = file.number(field, 8);
                field += 8;
            }
        }
    }
}

}  // namespace

std::uint64_t Bytes::number(std::uint64_t at, std::size_t count) const {
    const std::string_view part = cut(at, count);
    std::uint64_t value = 0;
    for (std::size_t index = count; index-- > 0;) {
        value = value << 8U | static_cast<unsigned char>(part[index]);
    }
    return value;
}

std::string_view Bytes::cut(std::uint64_t at, std::uint64_t count) const {
    if (at > text_.size() || count > text_.size() - at) {
        throw NpzFault{"is damaged: it ends too early"};
    }
    return text_.substr(at, count);
}

std::vector<Member> list_members(const Bytes& file) {
    const Directory directory = find_directory(file);
    std::vector<Member> members;
    std::uint64_t at = directory.offset;
    for (std::uint64_t index = 0; index < directory.entries; ++index) {
        if (file.number(at, 4) != 0x02014b50) {
            throw NpzFault{"is damaged: its directory is not where it should be"};
        }
        const std::uint64_t name = file.number(at + 28, 2);
        const std::uint64_t extra = file.number(at + 30, 2);
        const std::uint64_t comment = file.number(at + 32, 2);
        Member member{std::string(file.cut(at + 46, name)),
                      file.number(at + 10, 2),
                      file.number(at + 8, 2),
                      file.number(at + 16, 4),
                      file.number(at + 20, 4),
                      file.number(at + 24, 4),
                      file.number(at + 42, 4)};
        file.cut(at + 46 + name, extra + comment);
        read_zip64(file, member, at + 46 + name, at + 46 + name + extra);
        members.push_back(std::move(member));
        at += 46 + name + extra + comment;
    }
    return members;
}

std::string_view content_of(const Bytes& file, const Member& member) {
    const std::string shown = repr(member.name);
    if (member.method != 0 || (member.flags & 1U) != 0 || member.packed != member.size) {
        throw NpzFault{shown + " is compressed or encrypted; save it by numpy.savez, not savez_compressed"};
    }
    if (file.number(member.header, 4) != 0x04034b50) {
        throw NpzFault{"is damaged: " + shown + " is not where its directory says"};
    }
    const std::uint64_t start =
        member.header + 30 + file.number(member.header + 26, 2) + file.number(member.header + 28, 2);
    const std::string_view content = file.cut(start, member.size);
    if (crc32_z(0, reinterpret_cast<const Bytef*>(content.data()), content.size()) != member.crc) {
        throw NpzFault{"is damaged: the CRC of " + shown + " is another"};
    }
    return content;
}

}  // namespace neck
