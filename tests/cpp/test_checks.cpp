// What the library refuses before it does harm: tensors, files and options that cannot be right, objects that were moved.
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "expect.hpp"
#include "neck/engine.hpp"
#include "neck/fidelity.hpp"
#include "neck/image.hpp"
#include "neck/pool.hpp"
#include "neck/safetensors.hpp"
#include "neck/triton.hpp"
#include "tests.hpp"

namespace {

using neck::DataType;
using neck::Tensor;

void test_tensors() {
    expect_error([] { Tensor("a", DataType::float32, {2, 3}, std::vector<std::byte>(8)); }, "'a' has 8 bytes");
    expect_error([] { Tensor("a", DataType::uint8, {2, 3}, std::vector<std::byte>(7)); }, "needs 6");
    expect_error([] { Tensor("a", DataType::float32, {-1, 3}); }, "a float32 tensor cannot have the shape (-1, 3)");
    expect_error([] { Tensor("a", DataType::float32, {1LL << 40, 1LL << 40}); }, "a float32 tensor cannot have the "
                 "shape");
    expect_error([] { Tensor("a", DataType::float32, {1LL << 50}); }, "too little free memory");
    const Tensor whole("a", DataType::float32, {2, 3});
    expect(whole.data.size() == 24, "a tensor's own zeros");
    Tensor cut = whole;
    cut.data.resize(8);
    Tensor longer = whole;
    longer.shape = {4, 3};
    const neck::Tolerance tolerance;
    for (const Tensor& wrong : {cut, longer}) {
        expect_error([&] { neck::compare_output(whole, wrong, tolerance); }, "tensor 'a' has");
        expect_error([&] { neck::compare_output(wrong, whole, tolerance); }, "tensor 'a' has");
        expect_error([&] { neck::compare({whole}, {wrong}, "fp32"); }, "tensor 'a' has");
        expect_error([&] { wrong.slice(0, 1); }, "tensor 'a' has");
        expect_error([&] { neck::repeat(wrong, 2); }, "tensor 'a' has");
    }
    expect_error([&] { neck::compare_output(whole, Tensor("a", DataType::float32, {3, 2}), tolerance); },
                 "has the shape (3, 2), but its shape in the reference is (2, 3)");
    expect_error([&] { neck::repeat(whole, 0); }, "cannot be repeated 0 times");
    expect_error([&] { neck::repeat(whole, INT64_MAX); }, "a float32 tensor cannot have the shape");
    expect(neck::compare_output(whole, whole, tolerance).passed(), "the control");
    // an output that rounds more than the plan's precision has the tolerance of its own type, as in Python
    const Tensor half("a", DataType::float16, {2}, std::vector<std::byte>(4));
    expect(neck::compare({half}, {half}, "fp32").front().tolerance.relative_l2 == 1e-2, "the tolerance of FP16");
    expect(neck::compare({half}, {half}, "int8").front().tolerance.relative_l2 == 5e-2, "the looser of both");
    expect(neck::compare({whole}, {whole}, "fp32").front().tolerance.relative_l2 == 1e-4, "the control");
}

/// What is written can be read, or is not written.
void test_written_files(const std::string& folder) {
    const std::string path = (std::filesystem::path(folder) / "x.safetensors").string();
    const Tensor a("a", DataType::float32, {2});
    Tensor cut = a;
    cut.data.resize(3);
    const std::vector<std::vector<Tensor>> wrong{{a, a}, {cut}, {Tensor("__metadata__", DataType::uint8, {1})},
                                                 {Tensor("a'b", DataType::uint8, {1})},
                                                 {Tensor("a\xff", DataType::uint8, {1})}};
    for (const std::vector<Tensor>& tensors : wrong) {
        expect_error([&] { neck::write_safetensors(path, tensors); }, "");
        expect(!std::filesystem::exists(path), "nothing is written");
    }
    expect_error([&] { neck::write_safetensors(path, {a}, {{"k", "\xff"}}); }, "the metadata must be UTF-8 text");
    expect(!std::filesystem::exists(path), "nothing is written");
    const std::vector<Tensor> right{a, Tensor("", DataType::int64, {}), Tensor("empty", DataType::uint8, {0, 4}),
                                    Tensor("\xc3\xa9 b", DataType::bfloat16, {1, 1, 3})};
    neck::write_safetensors(path, right, {{"k", "v\n\"\xc3\xa9"}});
    expect(neck::read_safetensors(path).size() == right.size(), "what is written can be read");
    expect(neck::read_safetensors_metadata(path)["k"] == "v\n\"\xc3\xa9", "so can its metadata");
    std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
    expect_error([&] { neck::read_safetensors_metadata(path); }, "is damaged");
}

void test_options(const std::string& plan) {
    neck::EngineOptions options;
    options.max_batch = -3;
    expect_error([&] { neck::Engine(plan, options); }, "max_batch is -3");
    using Milliseconds = std::chrono::milliseconds;
    for (const int time : {0, -1}) {
        neck::TritonOptions client;
        client.timeout = Milliseconds(time);
        expect_error([&] { neck::TritonClient("localhost:1", client); }, "timeout is");
        client = {};
        client.connect_timeout = Milliseconds(time);
        expect_error([&] { neck::TritonClient("localhost:1", client); }, "connect_timeout is");
    }
    neck::TritonOptions client;
    client.largest_answer = 0;
    expect_error([&] { neck::TritonClient("localhost:1", client); }, "largest_answer is 0");
    for (const char* name : {"", "a b", "a:", "a\nb"}) {
        client = {};
        client.headers = {{name, "x"}};
        expect_error([&] { neck::TritonClient("localhost:1", client); }, "the HTTP header");
    }
    client = {};
    client.headers = {{"a", "x\r\nb: y"}};
    expect_error([&] { neck::TritonClient("localhost:1", client); }, "the HTTP header 'a' is invalid");
    client = {};
    client.token = "x\ny";
    expect_error([&] { neck::TritonClient("localhost:1", client); }, "control characters");
}

/// The second use of what was moved is what clang-tidy warns of, and what is tested here.
void test_moved(const std::string& plan) {
    neck::Engine engine(plan);
    neck::Engine other = std::move(engine);
    const std::vector<std::function<void(neck::Engine&)>> calls{
        [](neck::Engine& gone) { gone.manifest(); },       [](neck::Engine& gone) { gone.input(); },
        [](neck::Engine& gone) { gone.outputs(); },        [](neck::Engine& gone) { gone.runtime(); },
        [](neck::Engine& gone) { gone.warnings(); },       [](neck::Engine& gone) { gone.warm(); },
        [](neck::Engine& gone) { gone.failed(); },         [](neck::Engine& gone) { gone.recover(); },
        [](neck::Engine& gone) { gone.another(); },        [](neck::Engine& gone) { gone.context_bytes(); },
        [](neck::Engine& gone) { gone.loaded_bytes(); },   [](neck::Engine& gone) { gone.finished(); },
        [](neck::Engine& gone) { gone.device_outputs(); }, [](neck::Engine& gone) { gone.copy_out(nullptr); },
        [](neck::Engine& gone) { gone.enqueue(1, nullptr); },
        [](neck::Engine& gone) { gone.infer(image_of(1, 1), nullptr); },
        [](neck::Engine& gone) { gone.to_dlpack("full"); },
        [](neck::Engine& gone) { gone.bind_output("full", nullptr, 0); }};
    for (const auto& call : calls) {
        expect_error([&] { call(engine); }, "was moved from");  // NOLINT(bugprone-use-after-move)
    }
    engine.unbind_outputs();
    expect(doubled(other.infer(image_of(1, 2), nullptr), 1, 2), "the one that it was moved to");
    neck::Pool pool(plan);
    neck::Pool::Lease lease = pool.acquire(std::chrono::milliseconds(1));
    const neck::Pool::Lease next = std::move(lease);
    expect_error([&] { lease.stream(); }, "was moved from");  // NOLINT(bugprone-use-after-move)
    expect_error([&] { lease->input(); }, "was moved from");  // NOLINT(bugprone-use-after-move)
    neck::TritonClient client("localhost:1");
    const neck::TritonClient moved = std::move(client);
    expect_error([&] { client.url(); }, "was moved from");       // NOLINT(bugprone-use-after-move)
    expect_error([&] { client.model("x"); }, "was moved from");  // NOLINT(bugprone-use-after-move)
    expect_error([&] { client.infer("x", image_of(1, 1)); }, "was moved from");  // NOLINT(bugprone-use-after-move)
    expect_error([&] { client.infer_bytes("x", "y", {}); }, "was moved from");   // NOLINT(bugprone-use-after-move)
    expect(moved.url() == "http://localhost:1", "the one that it was moved to");
}

}  // namespace

void test_checks(const std::string& plan, const std::string& folder) {
    test_tensors();
    test_written_files(folder);
    test_options(plan);
    test_moved(plan);
}
