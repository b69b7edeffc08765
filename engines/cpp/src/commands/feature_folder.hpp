#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace neck {

/// The PNG and JPEG files of a folder by their suffix, sorted; hidden ones and folders are left out. What cannot be looked
/// at, such as a link to itself, is among them: reading it tells why.
/// \throws Error the folder cannot be listed, or holds none.
std::vector<std::filesystem::path> find_images(const std::filesystem::path& folder);

/// A folder of NAME.safetensors, one for each image; for this process alone until it ends.
class FeatureFolder {
public:
    /// \throws Error it cannot be used, or another process writes there.
    explicit FeatureFolder(const std::filesystem::path& folder);
    ~FeatureFolder();
    FeatureFolder(const FeatureFolder&) = delete;
    FeatureFolder& operator=(const FeatureFolder&) = delete;

    std::filesystem::path of(const std::filesystem::path& image) const;

    /// Whether an image's name is too long for that of its features, which is longer while they are written.
    static bool name_too_long(const std::filesystem::path& image);

    /// Removes what a process that was killed left half written: NAME.safetensors.XXXXXX.
    void tidy() const;

    /// The images whose features are missing, damaged, or of another image of the same name. What is done again and
    /// why is reported to the log.
    /// \throws Error features of another plan.
    std::vector<std::filesystem::path> find_missing(const std::vector<std::filesystem::path>& images,
                                                    const std::string& plan_hash) const;

private:
    std::filesystem::path folder_;
    int descriptor_ = -1;
};

}  // namespace neck
