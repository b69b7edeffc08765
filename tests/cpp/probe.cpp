// Shows what the library reads, for Python to compare with its own reading, or does wrong what must be seen.
#include <cstdio>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "neck/error.hpp"
#include "neck/manifest.hpp"
#include "neck/picture.hpp"
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
    } else if (kind == "plan") {
        line += " " + neck::read_manifest(file).flavor;
    } else {
        line += " " + neck::read_picture(file).describe();
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
        if (kind == "picture") {
            const neck::Tensor pixels = neck::read_picture(values[2]);
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
