// Shows what the library reads, for Python to compare with its own reading, or does wrong what must be seen.
#include <cstdio>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "faults.hpp"
#include "files/files.hpp"
#include "neck/error.hpp"
#include "neck/log.hpp"
#include "neck/manifest.hpp"
#include "neck/image.hpp"
#include "neck/preprocess.hpp"
#include "neck/safetensors.hpp"
#include "tests.hpp"

namespace {

void write(const std::vector<std::byte>& data) { std::fwrite(data.data(), 1, data.size(), stdout); }

void dump_halves() {
    for (unsigned bits = 0; bits < 0x10000; ++bits) {
        const float value = neck::half_to_float(static_cast<std::uint16_t>(bits));
        std::fwrite(&value, sizeof value, 1, stdout);
    }
}

/// What the limits let through: as many pixels and scans as there are, one fewer of each, and limits that are none.
void try_limits(const std::string& file) {
    const neck::Tensor pixels = neck::read_image(file);
    const std::int64_t count = pixels.shape[1] * pixels.shape[2];
    for (const neck::ImageLimits limits :
         {neck::ImageLimits{count * 100, 100}, {count - 1, 100}, {count * 100, 99}, {0, 100}, {count, 0}}) {
        try {
            neck::read_image(file, limits);
            std::cout << "read\n";
        } catch (const neck::Error& error) {
            const std::string told = error.what();
            std::cout << (told.find(" scans, but an image of this size") != std::string::npos ? "scans"
                          : told.find(" pixels, the limit") != std::string::npos              ? "pixels"
                                                                                              : "error")
                      << "\n";
        }
    }
}

/// Whether an image's file gives the same from memory, read and resized.
std::string compare_from_memory(const std::string& path) {
    const neck::FileBytes file = neck::read_file(path);
    const neck::Preprocessor preprocessor({"image", neck::DataType::uint8, {-1, 16, 20, 3}});
    const neck::Batch decoded = preprocessor.decode({file.text()});
    const bool same = neck::decode_image(file.data(), file.size()).data == neck::read_image(path).data &&
                      decoded.image.data == preprocessor.read({path}).image.data && decoded.fits.size() == 1;
    return same ? "same" : "different";
}

std::string read(const std::string& kind, const std::string& file) {
    std::string line = "read:";
    if (kind == "safetensors") {
        for (const neck::Tensor& tensor : neck::read_safetensors(file)) {
            double sum = 0;
            for (const float value : tensor.to_floats()) {
                sum += value;
            }
            line += " " + tensor.name + " " + tensor.describe() + " sum " + std::to_string(sum) + ";";
        }
    } else if (kind == "metadata") {
        for (const auto& [name, value] : neck::read_safetensors_metadata(file)) {
            line += " " + name + "=" + value.substr(0, 40);
        }
    } else if (kind == "plan") {
        line += " " + neck::read_manifest(file).flavor;
    } else if (kind == "memory") {
        return compare_from_memory(file);
    } else {
        const neck::Tensor pixels = neck::read_image(file);
        line += " " + neck::to_text(pixels.shape) + " " + neck::sha256(pixels.data.data(), pixels.data.size());
    }
    return line;
}

}  // namespace

int probe(int count, char** values) {
    const std::string kind = values[1];
    if (kind == "half") {
        dump_halves();
        return 0;
    }
    if (kind == "threads") {
        refuse_threads();
        return 0;
    }
    if (kind == "allocations") {
        const std::filesystem::path path = values[3];
        const std::string file(neck::read_file(path).text());
        const neck::Preprocessor preprocessor({"image", neck::DataType::uint8, {-1, 16, 20, 3}}, 2);
        const std::vector<std::string_view> files(3, file);
        const std::string what = values[2];
        fail_every_allocation(static_cast<std::size_t>(std::stoi(values[4])), [&] {
            if (what == "safetensors") {
                neck::read_safetensors(path);
            } else if (what == "metadata") {
                neck::read_safetensors_metadata(path);
            } else if (what == "plan") {
                neck::read_manifest(path);
            } else if (what == "memory") {
                preprocessor.decode(files);
            } else {
                neck::read_image(path);
            }
        });
        return 0;
    }
    if (kind == "leak") {
        cudaStream_t stream = nullptr;
        return static_cast<int>(cudaStreamCreateWithFlags(&stream, 0));
    }
    if (kind == "overflow") {
        void* memory = nullptr;
        cudaMalloc(&memory, 4);
        return static_cast<const volatile char*>(memory)[count + 2];
    }
    try {
        if (kind == "limits") {
            try_limits(values[2]);
            return 0;
        }
        if (kind == "log") {
            neck::set_log([](neck::LogLevel level, const std::string& line) {
                std::cout << (level == neck::LogLevel::warning ? "warning: " : "error: ") << line << "\n";
            });
            neck::read_image(values[2]);
            neck::set_log([](neck::LogLevel, const std::string&) { throw 3; });  // ignored
            neck::read_image(values[2]);
            neck::set_log({});
            neck::read_image(values[2]);
            return 0;
        }
        if (kind == "image") {
            const neck::Tensor pixels = neck::read_image(values[2]);
            write(pixels.data);
            write(neck::Preprocessor({"image", neck::DataType::float32, {-1, 3, pixels.shape[1], pixels.shape[2]}})
                      .prepare(pixels)
                      .image.data);
            return 0;
        }
        if (kind == "resize") {
            const neck::Port input{"image", neck::DataType::uint8, {-1, std::stoi(values[2]), std::stoi(values[3]), 3}};
            write(neck::Preprocessor(input, std::stoi(values[4])).read({values + 5, values + count}).image.data);
            return 0;
        }
    } catch (const neck::Error& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
    for (int index = 2; index < count; ++index) {
        try {
            std::cout << read(kind, values[index]) << "\n";
        } catch (const neck::Error& error) {
            std::cout << "error: " << error.what() << "\n";
        }
    }
    return 0;
}
