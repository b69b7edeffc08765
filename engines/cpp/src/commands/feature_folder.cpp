#include "commands/feature_folder.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <climits>
#include <map>
#include <system_error>

#include "files/files.hpp"
#include "files/log.hpp"
#include "images/header.hpp"
#include "neck/error.hpp"
#include "neck/safetensors.hpp"

namespace neck {
namespace {

namespace fs = std::filesystem;

constexpr const char* ending = ".safetensors";
constexpr std::size_t staged_ending = 7;  // what write_whole adds: a point and six letters

}  // namespace

FeatureFolder::FeatureFolder(const fs::path& folder) : folder_(folder) {
    std::error_code error;
    fs::create_directories(folder, error);
    descriptor_ = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor_ < 0) {
        throw Error(folder.string() + ": the output folder cannot be created or opened (" +
                    std::generic_category().message(errno) + "); check its permissions or choose another folder");
    }
    if (flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
        close(descriptor_);
        throw Error(folder.string() +
                    ": another process is writing features to this folder; wait until it has "
                    "finished, or choose another folder");
    }
}

FeatureFolder::~FeatureFolder() { close(descriptor_); }

fs::path FeatureFolder::of(const fs::path& image) const { return folder_ / (image.filename().string() + ending); }

bool FeatureFolder::name_too_long(const fs::path& image) {
    return image.filename().string().size() + std::string(ending).size() + staged_ending > NAME_MAX;
}

void FeatureFolder::tidy() const {
    const std::string mark = std::string(ending) + ".";
    try {
        for (const fs::directory_entry& entry : fs::directory_iterator(folder_)) {
            const std::string name = entry.path().filename().string();
            const std::size_t at = name.rfind(mark);
            std::error_code ignored;
            if (at != std::string::npos && name.size() == at + std::string(ending).size() + staged_ending &&
                entry.is_regular_file(ignored)) {
                fs::remove(entry.path(), ignored);
            }
        }
    } catch (const fs::filesystem_error& error) {
        throw Error(folder_.string() + ": the folder cannot be listed (" + error.code().message() +
                    "); check its permissions");
    }
}

std::vector<fs::path> find_images(const fs::path& folder) {
    std::vector<fs::path> images;
    try {
        for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
            std::string kind = entry.path().extension().string();
            std::transform(kind.begin(), kind.end(), kind.begin(),
                           [](unsigned char letter) { return static_cast<char>(std::tolower(letter)); });
            const bool named = std::find(image_suffixes.begin(), image_suffixes.end(), kind) != image_suffixes.end();
            const bool hidden = entry.path().filename().string().front() == '.';
            std::error_code unknown;
            if (named && !hidden && !entry.is_directory(unknown)) {
                images.push_back(entry.path());
            }
        }
    } catch (const fs::filesystem_error& error) {
        throw Error(folder.string() + ": the folder cannot be listed (" + error.code().message() +
                    "); pass a readable folder that contains images");
    }
    if (images.empty()) {
        throw Error(folder.string() +
                    ": the folder contains no images; add files that end in .png, .jpg, .jpeg, "
                    ".jpe or .jfif");
    }
    std::sort(images.begin(), images.end());
    return images;
}

namespace {

/// Whether an image is still the one that was recorded: of the same size and time, or else of the same bytes. One that
/// cannot be read is none.
bool same_image(const fs::path& image, std::map<std::string, std::string>& recorded) {
    try {
        const OpenFile file(image);
        if (recorded["image_bytes"] != std::to_string(file.size())) {
            return false;
        }
        return recorded["image_modified_ns"] == std::to_string(file.modified_ns()) ||
               recorded["image_sha256"] == sha256_of_file(image);
    } catch (const std::system_error&) {
        return false;
    }
}

}  // namespace

std::vector<fs::path> FeatureFolder::find_missing(const std::vector<fs::path>& images,
                                                  const std::string& plan_hash) const {
    std::vector<fs::path> missing;
    for (const fs::path& image : images) {
        const fs::path features = of(image);
        std::error_code unknown;
        if (!fs::exists(features, unknown)) {
            missing.push_back(image);
            continue;
        }
        std::map<std::string, std::string> recorded;
        try {
            recorded = read_safetensors_metadata(features);
        } catch (const MemoryError&) {
            throw;
        } catch (const Error& error) {
            log_line(LogLevel::warning, std::string(error.what()) + "; the features are computed again");
            missing.push_back(image);
            continue;
        }
        if (recorded["plan"] != plan_hash) {
            throw Error(features.string() +
                        ": these features were computed with another plan; choose another "
                        "output folder, or delete the old features");
        }
        if (!same_image(image, recorded)) {
            log_line(LogLevel::warning, image.string() +
                                            ": the image was changed after its features were computed; "
                                            "the features are computed again");
            missing.push_back(image);
        }
    }
    return missing;
}

}  // namespace neck
