// What the library reads of others: any bytes, files that are cut while they are read, JSON of any depth. It reads or
// throws a neck::Error; the sanitizers see the rest. NECK_FUZZ says what.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>

#include "client/triton.cpp"  // what reads answers is hidden in it
#include "neck/manifest.hpp"
#include "neck/image.hpp"
#include "neck/safetensors.hpp"

namespace {

std::int64_t cut_to = -1;  // bytes that the next file is cut to once its size is known; below 0: it is left alone

template <typename Read>
void expect_error_or_nothing(Read read) {
    try {
        read();
    } catch (const neck::Error&) {
    }
}

std::string folder() {
    static const std::string made = [] {
        std::string name = "/dev/shm/neck-fuzz-XXXXXX";
        return std::string(mkdtemp(name.data()));
    }();
    return made;
}

std::string write(const std::string& name, std::string_view data) {
    const std::string path = folder() + "/" + name;
    const int number = open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
    if (number < 0 || ::write(number, data.data(), data.size()) != static_cast<ssize_t>(data.size())) {
        std::abort();
    }
    close(number);
    return path;
}

/// The first two bytes say where a file is cut, if at all.
std::string_view take_cut(std::string_view data, std::int64_t& place) {
    if (data.size() < 2) {
        return data;
    }
    const auto first = static_cast<unsigned char>(data[0]);
    const auto second = static_cast<unsigned char>(data[1]);
    place = first % 2 == 0 ? -1 : static_cast<std::int64_t>((first / 2 * 256 + second) * data.size() / 32768);
    return data.substr(2);
}

/// Brackets, texts and numbers as the bytes say, each many times over: up to a million deep.
std::string nest(std::string_view data) {
    std::string text;
    std::string closing;
    for (const char letter : data) {
        const auto byte = static_cast<unsigned char>(letter);
        const std::size_t times = std::size_t{1} << (byte / 8U % 20U);
        for (std::size_t index = 0; index < times && text.size() < (1U << 20U); ++index) {
            text += byte % 8 < 3 ? "[" : byte % 8 < 5 ? "{\"a\":" : byte % 8 == 5 ? "\"\\\"[\"," : byte % 8 == 6 ? "1," : "]";
            if (byte % 8 < 5) {
                closing += byte % 8 < 3 ? ']' : '}';
            }
        }
    }
    return text + "1" + std::string(closing.rbegin(), closing.rend());
}

void read_safetensors_of(const std::string& path, std::int64_t cut) {
    cut_to = cut;
    expect_error_or_nothing([&] { neck::read_safetensors(path); });
    cut_to = -1;
    expect_error_or_nothing([&] { neck::read_safetensors_metadata(path); });
}

void read_manifest_of(std::string_view data, std::int64_t cut) {
    const std::string plan = write("x.plan", "plan");
    write("x.plan.json", data);
    cut_to = cut;
    expect_error_or_nothing([&] { neck::read_manifest(plan); });
    cut_to = -1;
}

/// The bytes as a server's answer: the first two are the length of its JSON.
void read_answer_of(std::string_view data) {
    neck::Answer answer;
    if (data.size() >= 2) {
        answer.header_length = static_cast<unsigned char>(data[0]) * 256U + static_cast<unsigned char>(data[1]);
        data.remove_prefix(2);
    }
    answer.body = data;
    neck::TritonModel model;
    try {
        const neck::Json json = neck::parse(data);
        model.inputs = neck::read_ports(json, "inputs", 4, &model.bytes_inputs);
        model.outputs = neck::read_ports(json, "outputs", 4, nullptr);
    } catch (const neck::Fault&) {
    } catch (const neck::Json::exception&) {
    }
    try {
        neck::server_error(answer);
        neck::check_whole(neck::read_outputs(answer), model, {"a", "b"}, 2);
    } catch (const neck::Fault&) {
    } catch (const neck::Json::exception&) {
    } catch (const neck::Error&) {
    }
}

}  // namespace

extern "C" int fstat(int number, struct stat* about) noexcept {
    const int code = static_cast<int>(syscall(SYS_fstat, number, about));
    if (code == 0 && cut_to >= 0 && S_ISREG(about->st_mode) && cut_to < about->st_size) {
        const std::string path = "/proc/self/fd/" + std::to_string(number);
        static_cast<void>(truncate(path.c_str(), cut_to) + 0);
    }
    return code;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
    static const std::string kind = std::getenv("NECK_FUZZ") != nullptr ? std::getenv("NECK_FUZZ") : "";
    const std::string_view data(reinterpret_cast<const char*>(bytes), size);
    std::int64_t cut = -1;
    neck::ImageLimits limits;
    limits.most_pixels = 1 << 20;
    if (kind == "images") {
        expect_error_or_nothing([&] { neck::decode_image(data.data(), data.size(), limits); });
    } else if (kind == "cut-images") {
        const std::string path = write("x.png", take_cut(data, cut));
        cut_to = cut;
        expect_error_or_nothing([&] { neck::read_image(path, limits); });
        cut_to = -1;
    } else if (kind == "safetensors") {
        const std::string path = write("x.safetensors", take_cut(data, cut));
        read_safetensors_of(path, cut);
    } else if (kind == "manifest") {
        const std::string_view rest = take_cut(data, cut);
        read_manifest_of(rest, cut);
    } else if (kind == "nested") {
        const std::string json = nest(data);
        const std::string header = "{\"__metadata__\":{\"plan\":" + json + "}}";
        const std::uint64_t length = header.size();
        const std::string path =
            write("x.safetensors", std::string(reinterpret_cast<const char*>(&length), sizeof length) + header);
        read_safetensors_of(path, -1);
        read_manifest_of("{\"kind\":\"plan\",\"format\":" + json + "}", -1);
        read_manifest_of(json, -1);
        read_answer_of(json);
    } else if (kind == "answers") {
        read_answer_of(data);
    } else {
        std::abort();
    }
    return 0;
}
