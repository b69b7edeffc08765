#include <csetjmp>
#include <cstddef>
#include <cstdio>
// libjpeg's header needs the two above
#include <jpeglib.h>
#include <jerror.h>

#include <array>
#include <new>
#include <string>
#include <vector>

#include "files/text.hpp"
#include "images/decode.hpp"

namespace neck {
namespace {

/// What libjpeg calls when it fails, warns or wants bytes; its own structures come first, as it expects.
struct Errors {
    jpeg_error_mgr manager;
    std::jmp_buf back;
    std::array<char, JMSG_LENGTH_MAX> reason;
    bool no_memory;
};

void on_error(j_common_ptr common) {
    auto& errors = *reinterpret_cast<Errors*>(common->err);
    errors.manager.format_message(common, errors.reason.data());
    errors.no_memory = errors.manager.msg_code == JERR_OUT_OF_MEMORY;
    std::longjmp(errors.back, 1);  // NOLINT: libjpeg is C, and no frame between has anything to destroy
}

/// Keeps the first warning. libjpeg goes on with pixels that it makes up, and so does Pillow.
void on_warning(j_common_ptr common, int level) {
    auto& errors = *reinterpret_cast<Errors*>(common->err);
    if (level < 0 && errors.manager.num_warnings++ == 0) {
        errors.manager.format_message(common, errors.reason.data());
    }
}

void on_text(j_common_ptr /*common*/) {}

void nothing(j_decompress_ptr /*info*/) {}

/// libjpeg is out of bytes: it would go on with gray pixels.
boolean on_end(j_decompress_ptr info) {
    auto& errors = *reinterpret_cast<Errors*>(info->err);
    std::snprintf(errors.reason.data(), errors.reason.size(), "the file ends too early");
    std::longjmp(errors.back, 1);  // NOLINT
}

void on_skip(j_decompress_ptr info, long count) {
    if (count > 0 && static_cast<std::size_t>(count) > info->src->bytes_in_buffer) {
        on_end(info);
    }
    if (count > 0) {
        info->src->next_input_byte += count;
        info->src->bytes_in_buffer -= static_cast<std::size_t>(count);
    }
}

/// Inks to light, as Pillow converts CMYK. Files have 255 for no ink, as Adobe writes them.
void cmyk_to_rgb(const JSAMPLE* inks, std::int64_t count, std::uint8_t* rgb) {
    for (std::int64_t index = 0; index < count; ++index, inks += 4, rgb += 3) {
        const unsigned light = inks[3];  // what black ink lets through
        for (std::size_t channel = 0; channel < 3; ++channel) {
            const unsigned ink = 255U - inks[channel];
            rgb[channel] = static_cast<std::uint8_t>(light - (ink * light + 127) / 255);  // to the nearest
        }
    }
}

void gray_to_rgb(const JSAMPLE* gray, std::int64_t count, std::uint8_t* rgb) {
    for (std::int64_t index = 0; index < count; ++index, rgb += 3) {
        rgb[0] = rgb[1] = rgb[2] = gray[index];
    }
}

/// Decodes. Nothing here needs a destructor: libjpeg's errors jump out.
/// \return false if it failed.
bool run(jpeg_decompress_struct& info, jpeg_source_mgr& source, Errors& errors, const Size& size, JSAMPLE* samples,
         std::uint8_t* rgb, Canvas& canvas) {
    if (setjmp(errors.back) != 0) {  // NOLINT
        return false;
    }
    jpeg_create_decompress(&info);
    info.src = &source;
    jpeg_read_header(&info, TRUE);
    if (info.data_precision != 8) {
        std::snprintf(errors.reason.data(), errors.reason.size(),
                      "the JPEG has %d bits per color value, but only 8 bits are supported", info.data_precision);
        return false;
    }
    if (info.num_components != 1 && info.num_components != 3 && info.num_components != 4) {
        std::snprintf(errors.reason.data(), errors.reason.size(),
                      "the JPEG has %d color components, but only 1, 3 or 4 color components are supported",
                      info.num_components);
        return false;
    }
    if (info.image_width != size.width || info.image_height != size.height) {
        std::snprintf(errors.reason.data(), errors.reason.size(),
                      "the image size in the JPEG header is ambiguous: libjpeg reads %u x %u pixels, but the neck "
                      "library reads %lld x %lld pixels",
                      info.image_width, info.image_height, static_cast<long long>(size.width),
                      static_cast<long long>(size.height));
        return false;
    }
    info.out_color_space = info.num_components == 1 ? JCS_GRAYSCALE : info.num_components == 3 ? JCS_RGB : JCS_CMYK;
    jpeg_start_decompress(&info);
    while (info.output_scanline < info.output_height) {
        const std::int64_t row = info.output_scanline;
        if (jpeg_read_scanlines(&info, &samples, 1) != 1) {
            return false;
        }
        if (info.num_components == 3) {
            canvas.put(row, samples);
            continue;
        }
        (info.num_components == 4 ? cmyk_to_rgb : gray_to_rgb)(samples, size.width, rgb);
        canvas.put(row, rgb);
    }
    jpeg_finish_decompress(&info);
    return true;
}

}  // namespace

void decode_jpeg(std::string_view file, const Header& header, Canvas& canvas) {
    std::vector<JSAMPLE> samples(static_cast<std::size_t>(header.size.width) * 4);
    std::vector<std::uint8_t> rgb(static_cast<std::size_t>(header.size.width) * 3);
    Errors errors{};
    jpeg_decompress_struct info{};
    info.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = on_error;
    errors.manager.emit_message = on_warning;
    errors.manager.output_message = on_text;
    jpeg_source_mgr source{};
    source.next_input_byte = reinterpret_cast<const JOCTET*>(file.data());
    source.bytes_in_buffer = file.size();
    source.init_source = nothing;
    source.fill_input_buffer = on_end;
    source.skip_input_data = on_skip;
    source.resync_to_restart = jpeg_resync_to_restart;
    source.term_source = nothing;
    const bool done = run(info, source, errors, header.size, samples.data(), rgb.data(), canvas);
    jpeg_destroy_decompress(&info);
    if (!done && errors.no_memory) {
        throw std::bad_alloc();
    }
    if (!done) {
        damaged(errors.reason.data());
    }
    if (errors.reason[0] != '\0') {
        canvas.warn("the image is damaged, so libjpeg made up some of the pixels (" + one_line(errors.reason.data()) +
                    ")");
    }
}

}  // namespace neck
