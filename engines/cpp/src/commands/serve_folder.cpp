#include "commands/serve_folder.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <future>
#include <iostream>
#include <map>
#include <mutex>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "commands/feature_folder.hpp"
#include "files/files.hpp"
#include "neck/pool.hpp"
#include "neck/preprocess.hpp"
#include "neck/safetensors.hpp"
#include "files/text.hpp"

namespace neck {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t largest_file = std::size_t{1} << 31U;
constexpr std::chrono::hours patience{24};  // contexts come back as soon as their run is over

/// The work of all threads, and what came of it.
class Work {
public:
    Work(std::vector<fs::path> images, const FeatureFolder& out, std::string hash, std::size_t batch)
        : images_(std::move(images)), out_(out), hash_(std::move(hash)), batch_(batch) {}

    /// Reads, runs and writes until no image is left, or a thread has failed.
    void run(Pool& pool, const Preprocessor& preprocessor, const Port& input) {
        try {
            while (!stopped_) {
                std::vector<Read> images;
                const Batch batch = read(preprocessor, images);
                if (images.empty()) {
                    return;
                }
                write(images, batch.fits, infer(pool, batch.image, input));
            }
        } catch (...) {
            stopped_ = true;
            throw;
        }
    }

    std::size_t done() const { return done_; }
    std::size_t bad() const { return bad_; }

private:
    /// An image that is in the batch, and what its features record of its file.
    struct Read {
        fs::path path;
        std::map<std::string, std::string> facts;
    };

    /// The bytes of an image file, and what is recorded of them.
    struct Source {
        FileBytes file;
        std::map<std::string, std::string> facts;
    };

    static Source read_source(const fs::path& path) {
        if (FeatureFolder::name_too_long(path)) {
            throw Error(path.string() +
                        ": the features file is named after the image, and that name would be too long; give the image "
                        "a shorter name");
        }
        try {
            OpenFile open(path);
            if (open.size() > largest_file) {
                throw Error(path.string() + ": the file has " + std::to_string(open.size()) +
                            " bytes, but an image may have "
                            "at most " +
                            std::to_string(largest_file) + "; replace or remove the file");
            }
            FileBytes file(open.size());
            open.read(file.data(), file.size());
            std::map<std::string, std::string> facts{{"image_bytes", std::to_string(file.size())},
                                                     {"image_modified_ns", std::to_string(open.modified_ns())},
                                                     {"image_sha256", sha256(file.data(), file.size())}};
            return {std::move(file), std::move(facts)};
        } catch (const std::system_error& error) {
            throw Error(path.string() + ": the image cannot be opened (" + error.code().message() +
                        "); check the path and its permissions");
        }
    }

    /// The next images that can be read, as many as one run takes.
    Batch read(const Preprocessor& preprocessor, std::vector<Read>& done) {
        Batch batch;
        while (done.size() < batch_) {
            const std::size_t index = next_++;
            if (index >= images_.size()) {
                break;
            }
            try {
                Source source = read_source(images_[index]);
                Batch one = preprocessor.prepare(
                    decode_image(source.file.data(), source.file.size(), {}, images_[index].string()));
                if (done.empty()) {
                    batch.image = std::move(one.image);
                } else {
                    batch.image.data.insert(batch.image.data.end(), one.image.data.begin(), one.image.data.end());
                    ++batch.image.shape[0];
                }
                batch.fits.push_back(one.fits[0]);
                done.push_back({images_[index], std::move(source.facts)});
            } catch (const MemoryError&) {
                throw;  // the image may be intact, and the next one would not fare better
            } catch (const Error& error) {
                ++bad_;
                const std::lock_guard<std::mutex> lock(printing_);
                std::cerr << "neck-engine: image skipped: " + std::string(error.what()) + "\n";
            }
        }
        return batch;
    }

    static std::vector<Tensor> infer(Pool& pool, const Tensor& image, const Port& input) {
        const Pool::Lease lease = pool.acquire(patience);
        if (image.shape[0] >= input.smallest_batch) {
            return lease->infer(image, lease.stream());
        }
        Tensor filled = image;  // the last images of a plan that takes no fewer: the first one fills up
        while (filled.shape[0] < input.smallest_batch) {
            const Tensor first = image.slice(0, 1);
            filled.data.insert(filled.data.end(), first.data.begin(), first.data.end());
            ++filled.shape[0];
        }
        return lease->infer(filled, lease.stream());
    }

    void write(const std::vector<Read>& images, const std::vector<Fit>& fits, const std::vector<Tensor>& outputs) {
        for (std::size_t index = 0; index < images.size(); ++index) {
            std::vector<Tensor> own;
            own.reserve(outputs.size());
            for (const Tensor& output : outputs) {
                own.push_back(output.slice(static_cast<std::int64_t>(index), 1));
            }
            const Fit& fit = fits[index];
            std::map<std::string, std::string> told = images[index].facts;
            told["plan"] = hash_;
            told["height"] = std::to_string(fit.original.height);
            told["width"] = std::to_string(fit.original.width);
            told["scale_y"] = format("%.17g", fit.scale_y);
            told["scale_x"] = format("%.17g", fit.scale_x);
            write_safetensors(out_.of(images[index].path), own, told);
            const std::size_t now = ++done_;
            if (isatty(STDERR_FILENO) != 0) {
                const std::lock_guard<std::mutex> lock(printing_);
                std::cerr << "\r" << (now + bad_) << " of " << images_.size() << " images processed" << std::flush;
            }
        }
    }

    std::vector<fs::path> images_;
    const FeatureFolder& out_;
    std::string hash_;
    std::size_t batch_;
    std::atomic<std::size_t> next_{0};
    std::atomic<std::size_t> done_{0};
    std::atomic<std::size_t> bad_{0};
    std::atomic<bool> stopped_{false};
    std::mutex printing_;
};

}  // namespace

Exit serve_folder(const fs::path& plan, const fs::path& in, const fs::path& out, const EngineOptions& engine,
                  const FolderOptions& options) {
    const std::vector<fs::path> images = find_images(in);
    const std::string hash = read_manifest(plan, engine.check_hashes).plan_hash();
    const FeatureFolder folder(out);
    folder.tidy();
    std::vector<fs::path> missing = folder.find_missing(images, hash);
    const std::size_t there = images.size() - missing.size();
    std::size_t done = 0;
    std::size_t bad = 0;
    if (!missing.empty()) {
        PoolOptions pooled;
        pooled.contexts = options.contexts;
        Pool pool(plan, pooled, engine);
        const Port input = pool.acquire(patience)->input();
        const std::int64_t batch = options.batch > 0 ? options.batch : input.optimum_batch;
        if (batch < input.smallest_batch || batch > input.largest_batch) {
            throw Error(plan.string() + ": the batch size is " + std::to_string(batch) +
                        ", but the plan's smallest batch size is " + std::to_string(input.smallest_batch) +
                        " and the plan's largest batch size is " + std::to_string(input.largest_batch) +
                        ". Set --batch to a value within these limits");
        }
        const Preprocessor preprocessor(input);
        Work work(std::move(missing), folder, hash, static_cast<std::size_t>(batch));
        std::vector<std::future<void>> others;
        for (int index = 0; index < std::max(1, options.threads); ++index) {
            others.push_back(std::async(std::launch::async, [&] { work.run(pool, preprocessor, input); }));
        }
        std::exception_ptr failed;
        for (std::future<void>& other : others) {
            try {
                other.get();
            } catch (...) {
                failed = std::current_exception();
            }
        }
        if (failed) {
            std::rethrow_exception(failed);
        }
        done = work.done();
        bad = work.bad();
        std::cerr << (isatty(STDERR_FILENO) != 0 ? "\n" : "");
    }
    std::cout << out.string() << ": features of " << done << " images written, " << there << " existed already, " << bad
              << " failed\n";
    return bad == 0 ? Exit::done : Exit::failed;
}

}  // namespace neck
