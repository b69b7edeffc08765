#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace neck {

/// The PNG and JPEG files of a folder by their suffix, sorted; hidden ones are left out.
/// \throws Error it cannot be listed, or holds none.
std::vector<std::filesystem::path> find_pictures(const std::filesystem::path& folder);

/// A folder of NAME.safetensors, one for each picture; for this process alone until it ends.
class FeatureFolder {
public:
    /// \throws Error it cannot be used, or another process writes there.
    explicit FeatureFolder(const std::filesystem::path& folder);
    ~FeatureFolder();
    FeatureFolder(const FeatureFolder&) = delete;
    FeatureFolder& operator=(const FeatureFolder&) = delete;

    std::filesystem::path of(const std::filesystem::path& picture) const;

    /// Removes what a process that was killed left half written: NAME.safetensors.XXXXXX.
    void tidy() const;

    /// The pictures whose features are not there yet.
    /// \throws Error features of another plan.
    std::vector<std::filesystem::path> find_missing(const std::vector<std::filesystem::path>& pictures,
                                                    const std::string& plan_hash) const;

private:
    std::filesystem::path folder_;
    int descriptor_ = -1;
};

}  // namespace neck
