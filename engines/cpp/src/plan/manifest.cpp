#include "neck/manifest.hpp"

#include <algorithm>
#include <system_error>

#include "files/files.hpp"
#include "files/guard.hpp"
#include "files/json.hpp"
#include "neck/error.hpp"
#include "files/text.hpp"

namespace neck {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t format_here = 1;
constexpr std::size_t largest_manifest = std::size_t{1} << 26U;
constexpr std::string_view rtx_magic = "vtrt";  // first bytes of a TensorRT-RTX plan

Manifest::Spec read_spec(const Json& port) {
    Manifest::Spec spec{text_at(port, "name"), text_at(port, "dtype"), {}};
    if (!plain(spec.name)) {
        throw Fault{"the tensor name " + repr(spec.name) +
                    " contains a single quote, a backslash, a control character or invalid UTF-8"};
    }
    if (!plain(spec.dtype)) {
        throw Fault{"the data type " + repr(spec.dtype) + " of the tensor " + spec.name +
                    " contains a single quote, a backslash, a control character or invalid UTF-8"};
    }
    for (const Json& side : list_at(port, "shape")) {
        if (!side.is_string() && !side.is_number_integer()) {
            throw Fault{"the shape of the tensor " + spec.name +
                        " must contain only whole numbers and strings, but contains a value of the JSON type " +
                        side.type_name()};
        }
        spec.shape.push_back(side.is_string() ? -1 : side.get<std::int64_t>());
    }
    return spec;
}

/// What was verified, as `neck-export inspect` says it.
std::string read_verification(const Json& content) {
    const auto found = content.find("verification");
    if (found == content.end() || !found->is_object()) {
        return "not recorded";
    }
    const auto verified = found->find("verified");
    if (verified != found->end() && verified->is_boolean() && verified->get<bool>()) {
        return "verified: " + one_line(text_or_empty(*found, "method"));
    }
    const std::string reason = one_line(text_or_empty(*found, "reason"));
    return reason.empty() ? "not verified" : reason;
}

std::string read_text(const fs::path& path) {
    try {
        return std::string(read_file(path, largest_manifest).text());
    } catch (const std::system_error& error) {
        if (error.code() == std::errc::no_such_file_or_directory) {
            throw Error(path.string() +
                        ": the manifest is missing; neck-export writes one beside each ONNX file and plan, so copy the "
                        "manifest to this path, or build the plan again");
        }
        throw Error(path.string() + ": the manifest cannot be read (" + error.code().message() +
                    "); build the plan again");
    }
}

Json parse(const fs::path& path) {
    Json content;
    try {
        content = parse_json_or_say(read_text(path));
    } catch (const Fault& fault) {
        throw Error(path.string() + ": the manifest cannot be read (" + fault.why + "); build the plan again");
    }
    if (text_or_empty(content, "kind") != "plan") {
        throw Error(path.string() +
                    ": this is not a neck-export manifest of type 'plan'; to write a new manifest, "
                    "build the plan again");
    }
    const auto format_found = content.find("format");
    const bool known = format_found != content.end() && format_found->is_number_integer();
    if (!known || format_found->get<std::int64_t>() > format_here) {
        const std::string got = format_found == content.end() ? "None" : one_line(dump_json(*format_found));
        throw Error(path.string() + ": the manifest has format " + got + ", but this version of neck-export reads "
                    "format " +
                    std::to_string(format_here) +
                    "; upgrade neck-export, or build the plan again with this version");
    }
    return content;
}

std::vector<Manifest::File> read_files(const fs::path& path, const Json& content) {
    try {
        std::vector<Manifest::File> files;
        for (const Json& entry : list_at(content, "files")) {
            const Json& bytes = at(entry, "bytes");
            if (!bytes.is_number_integer()) {
                throw Fault{"no bytes"};
            }
            files.push_back({text_at(entry, "name"), bytes.get<std::int64_t>(), text_at(entry, "sha256")});
        }
        return files;
    } catch (const Fault&) {
        throw Error(path.string() + ": the manifest's list of files, sizes and SHA-256 values is missing or damaged; "
                    "build the plan again");
    }
}

void check_file(const fs::path& manifest, const Manifest::File& entry, bool hashes) {
    if (entry.name.empty() || entry.name.find('/') != std::string::npos || entry.name.find('\0') != std::string::npos) {
        throw Error(manifest.string() + ": the manifest names the path " + repr(entry.name) +
                    ", which is outside the manifest's folder; build the plan again");
    }
    const fs::path path = fs::path(manifest).replace_filename(entry.name);
    std::error_code error;
    if (!fs::is_regular_file(path, error)) {
        throw Error(path.string() + ": the file is missing, but the manifest " + manifest.filename().string() +
                    " lists it; copy the file to this path, or build the plan again");
    }
    const auto changed = [&] {
        return Error(path.string() + ": the file was changed after its manifest " + manifest.filename().string() +
                     " was written; copy the file again, or build the plan again");
    };
    try {
        const std::size_t bytes = OpenFile(path).size();
        if (bytes != static_cast<std::uint64_t>(entry.bytes)) {
            throw Error(path.string() + ": the file has " + std::to_string(bytes) + " bytes, but its manifest says " +
                        std::to_string(entry.bytes) + " bytes; copy the file again, or build the plan again");
        }
        if (hashes && sha256_of_file(path) != entry.sha256) {
            throw changed();
        }
    } catch (const OpenFile::Ended&) {
        throw changed();
    } catch (const std::system_error& failed) {
        throw Error(path.string() + ": the file cannot be read (" + failed.code().message() +
                    "); check its permissions");
    }
}

std::string read_header(const fs::path& plan) {
    try {
        OpenFile file(plan);
        std::string header(std::min(file.size(), rtx_magic.size()), '\0');
        file.read(reinterpret_cast<std::byte*>(header.data()), header.size());
        if (header.empty()) {
            throw Error(plan.string() + ": the file is empty; build the plan again");
        }
        return header;
    } catch (const std::system_error& error) {
        if (error.code() != std::errc::no_such_file_or_directory) {
            throw Error(plan.string() + ": the file cannot be read (" + error.code().message() +
                        "); pass a readable plan built with `neck-export trt`");
        }
        const std::string rejected = plan.string() + ".rejected";
        std::error_code ignored;
        const bool failed = fs::exists(rejected, ignored);
        throw Error("No such file: " + plan.string() + "; " +
                    (failed ? "the plan failed verification and was kept as " + rejected + "; see " + rejected + ".json"
                            : "build it with `neck-export trt`"));
    }
}

/// The keys that `export/contract/manifest.py` does not check itself.
void read_values(const Json& content, Manifest& manifest) {
    manifest.flavor = text_at(content, "flavor");
    manifest.tensorrt_version = text_at(content, "tensorrt_version");
    manifest.precision = text_at(content, "precision");
    manifest.batch = content.value("batch", std::string());
    for (const Json& capability : list_at(content, "compute_capabilities")) {
        manifest.compute_capabilities.push_back(capability.is_string() ? capability.get<std::string>() : "?");
    }
    const Json& options = at(content, "options");
    const Json& compatible = at(options, "version_compatible");
    manifest.version_compatible = compatible.is_boolean() && compatible.get<bool>();
    manifest.hardware_compatible = text_at(options, "hardware_compatible");
    for (const Json& port : list_at(content, "inputs")) {
        manifest.inputs.push_back(read_spec(port));
    }
    for (const Json& port : list_at(content, "outputs")) {
        manifest.outputs.push_back(read_spec(port));
    }
    manifest.verification = read_verification(content);
}

}  // namespace

const std::string& Manifest::plan_hash() const {
    // X.plan.json is beside X.plan; read_manifest refuses one that does not speak of it
    return std::find_if(files.begin(), files.end(), [&](const File& file) { return file.name == path.stem(); })->sha256;
}

fs::path manifest_path(const fs::path& plan) { return plan.string() + ".json"; }

namespace {

Manifest read_checked(const fs::path& plan, bool hashes) {
    const std::string header = read_header(plan);
    Manifest manifest;
    manifest.path = manifest_path(plan);
    const Json content = parse(manifest.path);
    manifest.files = read_files(manifest.path, content);
    try {
        read_values(content, manifest);
    } catch (const Fault& fault) {
        throw Error(manifest.path.string() + ": the manifest is damaged (" + one_line(fault.why) + "); build " +
                    plan.filename().string() + " again");
    } catch (const Json::exception& error) {
        throw Error(manifest.path.string() + ": the manifest is damaged (" + one_line(error.what()) + "); build " +
                    plan.filename().string() + " again");
    }
    if ((header == rtx_magic) != (manifest.flavor == "rtx")) {
        throw Error(plan.string() + ": the manifest says that this is a plan for " + manifest.flavor +
                    ", but the file begins with b" + repr(header) + ", and no plan for " + manifest.flavor +
                    " begins like that; build the plan again");
    }
    for (const Manifest::File& file : manifest.files) {
        check_file(manifest.path, file, hashes);
    }
    const std::string name = plan.filename().string();
    const auto own = [&](const Manifest::File& file) { return file.name == name; };
    if (std::none_of(manifest.files.begin(), manifest.files.end(), own)) {
        const std::string names = joined(manifest.files, [](const Manifest::File& file) { return file.name; });
        throw Error(manifest.path.string() + ": the manifest does not list the plan " + name +
                    ". Files that the manifest lists: " + (names.empty() ? "none" : names) +
                    ". Build the plan again with `neck-export trt`");
    }
    return manifest;
}

}  // namespace

Manifest read_manifest(const fs::path& plan, bool hashes) {
    return guarded(plan, [&] { return read_checked(plan, hashes); });
}

}  // namespace neck
