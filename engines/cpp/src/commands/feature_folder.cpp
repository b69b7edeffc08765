#include "commands/feature_folder.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <system_error>

#include "neck/error.hpp"
#include "neck/safetensors.hpp"

namespace neck {
namespace {

namespace fs = std::filesystem;

constexpr const char* ending = ".safetensors";

}  // namespace

FeatureFolder::FeatureFolder(const fs::path& folder) : folder_(folder) {
    std::error_code error;
    fs::create_directories(folder, error);
    descriptor_ = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor_ < 0) {
        throw Error(folder.string() + ": cannot be used (" + std::generic_category().message(errno) +
                    "); give a folder for the features");
    }
    if (flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
        close(descriptor_);
        throw Error(folder.string() + ": another process writes features there; wait for it, or give another folder");
    }
}

FeatureFolder::~FeatureFolder() { close(descriptor_); }

fs::path FeatureFolder::of(const fs::path& picture) const { return folder_ / (picture.filename().string() + ending); }

void FeatureFolder::tidy() const {
    const std::string mark = std::string(ending) + ".";
    for (const fs::directory_entry& entry : fs::directory_iterator(folder_)) {
        const std::string name = entry.path().filename().string();
        const std::size_t at = name.rfind(mark);
        if (at != std::string::npos && name.size() == at + mark.size() + 6 && entry.is_regular_file()) {
            fs::remove(entry.path());
        }
    }
}

std::vector<fs::path> find_pictures(const fs::path& folder) {
    std::vector<fs::path> pictures;
    try {
        for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
            std::string kind = entry.path().extension().string();
            std::transform(kind.begin(), kind.end(), kind.begin(),
                           [](unsigned char letter) { return static_cast<char>(std::tolower(letter)); });
            const bool hidden = entry.path().filename().string().front() == '.';
            if (!hidden && (kind == ".png" || kind == ".jpg" || kind == ".jpeg") && entry.is_regular_file()) {
                pictures.push_back(entry.path());
            }
        }
    } catch (const fs::filesystem_error& error) {
        throw Error(folder.string() + ": cannot be listed (" + error.code().message() +
                    "); give a folder that holds pictures");
    }
    if (pictures.empty()) {
        throw Error(folder.string() + ": holds no picture; put files there that end in .png, .jpg or .jpeg");
    }
    std::sort(pictures.begin(), pictures.end());
    return pictures;
}

std::vector<fs::path> FeatureFolder::find_missing(const std::vector<fs::path>& pictures,
                                                  const std::string& plan_hash) const {
    std::vector<fs::path> missing;
    for (const fs::path& picture : pictures) {
        const fs::path features = of(picture);
        if (!fs::exists(features)) {
            missing.push_back(picture);
        } else if (read_safetensors_metadata(features)["plan"] != plan_hash) {
            throw Error(features.string() + ": has features of another plan; give another folder, or remove them");
        }
    }
    return missing;
}

}  // namespace neck
