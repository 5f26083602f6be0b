#include "host/sinks.h"

#include <cmath>
#include <filesystem>

#include "base/sha256.h"
#include "greedy/greedy.hpp"
#include "host/ffmpeg.h"
#include "host/output.h"
#include "host/part.h"

namespace greedy::host {
namespace {
namespace fs = std::filesystem;

[[noreturn]] void fail(int status, const std::string& what, const std::string& got, const std::string& expected) {
    throw StatusError(status, what + ": got " + got + ", expected " + expected);
}

class NullSink : public FrameSink {
  public:
    void write(const std::uint8_t*) override {}
    void close() override {}
    std::string abort() override { return {}; }
};

class ChecksumSink : public FrameSink {
  public:
    explicit ChecksumSink(std::size_t size) : size_(size) {}
    void write(const std::uint8_t* rgb) override { hash_.add(rgb, size_); }
    void close() override {}
    std::string abort() override { return {}; }
    std::string digest() const override { return hash_.hex(); }

  private:
    const std::size_t size_;
    core::Sha256 hash_;
};

class RawSink : public FrameSink {
  public:
    RawSink(const std::string& name, std::size_t size) : output_(name, notes_), size_(size) {}
    void write(const std::uint8_t* rgb) override {
        output_.write(rgb, size_);
        output_.mark();
    }
    void close() override { output_.keep(); }
    std::string abort() override { return output_.rescue(); }

  protected:
    Output output_;
    const std::size_t size_;
};

// YUV4MPEG2, 4:4:4, BT.601 in limited range. The format has no field for the matrix, and readers assume this one.
class Y4mSink : public RawSink {
  public:
    Y4mSink(const std::string& name, int width, int height, double fps)
        : RawSink(name, 3 * static_cast<std::size_t>(width) * static_cast<std::size_t>(height)), planes_(size_) {
        const auto [rate, base] = fraction(fps);
        header_ = "YUV4MPEG2 W" + std::to_string(width) + " H" + std::to_string(height) + " F" + std::to_string(rate) +
                  ":" + std::to_string(base) + " Ip A1:1 C444 XCOLORRANGE=LIMITED\n";
    }

    void write(const std::uint8_t* rgb) override {
        static constexpr float kRows[3][4] = {
            {65.481f, 128.553f, 24.966f, 16}, {-37.797f, -74.203f, 112.0f, 128}, {112.0f, -93.786f, -18.214f, 128}};
        const std::size_t area = size_ / 3;
        for (std::size_t i = 0; i < area; ++i)
            for (std::size_t plane = 0; plane < 3; ++plane) {
                const float* row = kRows[plane];
                const float sum =
                    row[0] / 255 * rgb[3 * i] + row[1] / 255 * rgb[3 * i + 1] + row[2] / 255 * rgb[3 * i + 2];
                planes_[plane * area + i] = static_cast<std::uint8_t>(std::nearbyint(sum + row[3]));
            }
        header_ += "FRAME\n";
        output_.write(header_.data(), header_.size());
        output_.write(planes_.data(), planes_.size());
        header_.clear();
        output_.mark();
    }

  private:
    std::string header_;  // of the file and of the next frame
    std::vector<std::uint8_t> planes_;
};

// The suffix in lower case, or the format of standard output.
std::string kind_of(const std::string& target, const std::string& format) {
    if (target == "-") return format.empty() ? "y4m" : format;
    std::string kind = fs::path(target).extension().string();
    for (char& c : kind) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    return kind.empty() ? kind : kind.substr(1);
}

}  // namespace

std::unique_ptr<FrameSink> open_sink(const std::string& target, const std::string& format, int width, int height,
                                     double fps) {
    if (width < 1 || height < 1 || !(fps >= 0.01 && fps <= 1000))
        fail(GREEDY_INVALID, "output", "a size or rate out of range", "pixels and 0.01 to 1000 frames a second");
    if (!format.empty() && target != "-")
        fail(GREEDY_INVALID, "format", format + " for " + shown(target), "it for - (stdout); a file has a suffix");
    const std::size_t size = 3 * static_cast<std::size_t>(width) * static_cast<std::size_t>(height);
    if (target == "null") return std::make_unique<NullSink>();
    if (target == "checksum") {
        check_stdout("output", target);
        return std::make_unique<ChecksumSink>(size);
    }
    const std::string kind = kind_of(target, format);
    if (target == "-") {
        if (kind != "y4m" && kind != "rgb") fail(GREEDY_INVALID, "format", format, "one of y4m, rgb");
    } else {
        check_place(target);
        if (kind != "y4m" && kind != "rgb" && !is_video(kind))
            fail(GREEDY_INVALID, "output", shown(target), ".mp4, .mov, .mkv, .webm, .y4m, .rgb, null, checksum or -");
    }
    if (kind == "y4m") return std::make_unique<Y4mSink>(target, width, height, fps);
    if (kind == "rgb") return std::make_unique<RawSink>(target, size);
    return open_ffmpeg(target, kind, width, height, fps);
}

}  // namespace greedy::host
