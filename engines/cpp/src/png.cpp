#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>

#include "decoders.hpp"
#include "text.hpp"

namespace neck {
namespace {

/// All that outlives a longjmp out of libpng lies here, not in the frame that calls it.
struct PngReader {
    const MappedFile& file;
    std::size_t position = 0;
    char message[200] = "no reason given";
    png_structp png = nullptr;
    png_infop info = nullptr;
    Pixels pixels{};
    std::vector<png_bytep> rows{};

    explicit PngReader(const MappedFile& source) : file(source) {}
    PngReader(const PngReader&) = delete;
    PngReader& operator=(const PngReader&) = delete;
    ~PngReader() { png_destroy_read_struct(&png, &info, nullptr); }
};

[[noreturn]] void on_error(png_structp png, png_const_charp message) {
    auto* reader = static_cast<PngReader*>(png_get_error_ptr(png));
    std::strncpy(reader->message, message, sizeof reader->message - 1);
    png_longjmp(png, 1);
}

void on_warning(png_structp /*png*/, png_const_charp /*message*/) {}

void on_read(png_structp png, png_bytep target, std::size_t count) {
    auto* reader = static_cast<PngReader*>(png_get_io_ptr(png));
    if (count > reader->file.size() - reader->position) {
        png_error(png, "it ends too early");
    }
    std::memcpy(target, reader->file.data() + reader->position, count);
    reader->position += count;
}

/// No object with a destructor may live in the frames below: libpng leaves them by longjmp.
bool read_header(PngReader& reader) {
    if (setjmp(png_jmpbuf(reader.png)) != 0) {  // NOLINT: libpng's own way
        return false;
    }
    png_set_read_fn(reader.png, &reader, on_read);
    png_read_info(reader.png, reader.info);
    reader.pixels.size = {png_get_image_height(reader.png, reader.info), png_get_image_width(reader.png, reader.info)};
    return true;
}

bool set_rgb(PngReader& reader) {
    if (setjmp(png_jmpbuf(reader.png)) != 0) {  // NOLINT: libpng's own way
        return false;
    }
    png_set_expand(reader.png);       // palettes to colours, 1, 2 and 4 bits to 8
    png_set_strip_16(reader.png);     // the high byte, as Pillow
    png_set_strip_alpha(reader.png);  // dropped, not blended
    png_set_gray_to_rgb(reader.png);
    png_set_interlace_handling(reader.png);
    png_read_update_info(reader.png, reader.info);
    return true;
}

bool read_rows(PngReader& reader) {
    if (setjmp(png_jmpbuf(reader.png)) != 0) {  // NOLINT: libpng's own way
        return false;
    }
    png_read_image(reader.png, reader.rows.data());
    png_read_end(reader.png, reader.info);
    return true;
}

[[noreturn]] void damaged(const PngReader& reader) {
    throw PictureFault("is damaged (" + one_line(reader.message) + "); fetch it again or save it as 8-bit RGB PNG");
}

}  // namespace

Pixels decode_png(const MappedFile& file, Size wanted) {
    PngReader reader(file);
    reader.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &reader, on_error, on_warning);
    reader.info = reader.png != nullptr ? png_create_info_struct(reader.png) : nullptr;
    if (reader.info == nullptr || !read_header(reader)) {
        damaged(reader);
    }
    check_size(reader.pixels.size, wanted);
    if (!set_rgb(reader)) {
        damaged(reader);
    }
    const std::size_t stride = png_get_rowbytes(reader.png, reader.info);
    if (stride != static_cast<std::size_t>(wanted.width) * 3) {
        throw PictureFault("has pixels of a kind that is not known; save it as 8-bit RGB PNG");
    }
    reader.pixels.data.resize(stride * static_cast<std::size_t>(wanted.height));
    for (std::size_t row = 0; row < static_cast<std::size_t>(wanted.height); ++row) {
        reader.rows.push_back(reinterpret_cast<png_bytep>(reader.pixels.data.data()) + row * stride);
    }
    if (!read_rows(reader)) {
        damaged(reader);
    }
    png_uint_32 size = 0;
    png_bytep exif = nullptr;
    if (png_get_eXIf_1(reader.png, reader.info, &size, &exif) != 0 && exif != nullptr) {
        check_upright(exif, size);
    }
    return std::move(reader.pixels);
}

}  // namespace neck
