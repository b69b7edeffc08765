#include <cstddef>
#include <cstdio>

#include <jpeglib.h>

#include <jerror.h>

#include <csetjmp>
#include <cstring>
#include <utility>

#include "decoders.hpp"
#include "text.hpp"

namespace neck {
namespace {

constexpr unsigned exif_bytes = 65'533;

/// All that outlives a longjmp out of libjpeg lies here, not in the frame that calls it.
struct JpegReader {
    jpeg_error_mgr errors{};  // first: libjpeg hands it back as a pointer to the whole
    std::jmp_buf escape{};
    char message[JMSG_LENGTH_MAX] = "no reason given";
    jpeg_decompress_struct jpeg{};
    Pixels pixels{};

    JpegReader() = default;
    JpegReader(const JpegReader&) = delete;
    JpegReader& operator=(const JpegReader&) = delete;
    ~JpegReader() { jpeg_destroy_decompress(&jpeg); }
};

[[noreturn]] void on_error(j_common_ptr common) {
    auto* reader = reinterpret_cast<JpegReader*>(common->err);
    common->err->format_message(common, reader->message);
    std::longjmp(reader->escape, 1);
}

void on_message(j_common_ptr common, int level) {
    const int code = common->err->msg_code;
    // others than these two mean pixels that libjpeg made up, the missing end of a file above all
    if (level < 0 && code != JWRN_EXTRANEOUS_DATA && code != JWRN_ADOBE_XFORM) {
        on_error(common);
    }
}

/// No object with a destructor may live in the frames below: libjpeg leaves them by longjmp.
bool read_header(JpegReader& reader, const unsigned char* data, std::size_t size) {
    if (setjmp(reader.escape) != 0) {  // NOLINT: libjpeg's own way
        return false;
    }
    jpeg_create_decompress(&reader.jpeg);
    jpeg_mem_src(&reader.jpeg, data, static_cast<unsigned long>(size));  // NOLINT: its type
    jpeg_save_markers(&reader.jpeg, JPEG_APP0 + 1, exif_bytes);
    jpeg_read_header(&reader.jpeg, TRUE);
    reader.pixels.size = {reader.jpeg.image_height, reader.jpeg.image_width};
    return true;
}

bool read_rows(JpegReader& reader) {
    if (setjmp(reader.escape) != 0) {  // NOLINT: libjpeg's own way
        return false;
    }
    reader.jpeg.out_color_space = JCS_RGB;
    jpeg_start_decompress(&reader.jpeg);
    const std::size_t stride = std::size_t{reader.jpeg.output_width} * 3;
    while (reader.jpeg.output_scanline < reader.jpeg.output_height) {
        auto* row = reinterpret_cast<JSAMPROW>(reader.pixels.data.data()) + reader.jpeg.output_scanline * stride;
        jpeg_read_scanlines(&reader.jpeg, &row, 1);
    }
    jpeg_finish_decompress(&reader.jpeg);
    return true;
}

[[noreturn]] void damaged(const JpegReader& reader) {
    throw PictureFault("is damaged (" + one_line(reader.message) + "); fetch it again or save it as 8-bit RGB PNG");
}

}  // namespace

Pixels decode_jpeg(const MappedFile& file, Size wanted) {
    JpegReader reader;
    reader.jpeg.err = jpeg_std_error(&reader.errors);
    reader.errors.error_exit = on_error;
    reader.errors.emit_message = on_message;
    if (!read_header(reader, reinterpret_cast<const unsigned char*>(file.data()), file.size())) {
        damaged(reader);
    }
    check_size(reader.pixels.size, wanted);
    if (reader.jpeg.jpeg_color_space == JCS_CMYK || reader.jpeg.jpeg_color_space == JCS_YCCK) {
        throw PictureFault("is a CMYK JPEG; save it as RGB");
    }
    for (jpeg_saved_marker_ptr marker = reader.jpeg.marker_list; marker != nullptr; marker = marker->next) {
        if (marker->data_length > 6 && std::memcmp(marker->data, "Exif\0\0", 6) == 0) {
            check_upright(marker->data + 6, marker->data_length - 6);
        }
    }
    reader.pixels.data.resize(static_cast<std::size_t>(wanted.height) * static_cast<std::size_t>(wanted.width) * 3);
    if (!read_rows(reader)) {
        damaged(reader);
    }
    return std::move(reader.pixels);
}

}  // namespace neck
