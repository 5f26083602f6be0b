#include "host/sinks.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <utility>
#include <vector>

#include "base/sha256.h"
#include "greedy/greedy.hpp"

namespace greedy::host {
namespace {
namespace fs = std::filesystem;

[[noreturn]] void fail(int status, const std::string& what, const std::string& got, const std::string& expected) {
    throw StatusError(status, what + ": got " + got + ", expected " + expected);
}

[[noreturn]] void system_failure(const std::string& what) {
    fail(GREEDY_FAILED, what, std::strerror(errno), "it to work");
}

// The nearest fraction with a denominator of at most 1001 (broadcast rates are n/1001), by continued fractions.
std::pair<std::int64_t, std::int64_t> fraction(double value) {
    std::int64_t p0 = 0, q0 = 1, p1 = 1, q1 = 0;
    for (double rest = value;;) {
        const std::int64_t whole = static_cast<std::int64_t>(std::floor(rest));
        if (q0 + whole * q1 > 1001) {
            const std::int64_t steps = (1001 - q0) / q1, p = p0 + steps * p1, q = q0 + steps * q1;
            const auto distance = [&](std::int64_t a, std::int64_t b) {
                return std::abs(static_cast<double>(a) / static_cast<double>(b) - value);
            };
            return distance(p1, q1) <= distance(p, q) ? std::pair(p1, q1) : std::pair(p, q);
        }
        p0 = std::exchange(p1, p0 + whole * p1);
        q0 = std::exchange(q1, q0 + whole * q1);
        if (std::abs(rest - static_cast<double>(whole)) < 1e-9) return {p1, q1};
        rest = 1 / (rest - static_cast<double>(whole));
    }
}

// A file under a temporary name, or (name empty) standard output.
class Output {
  public:
    explicit Output(const std::string& name) : name_(name) {
        if (name.empty()) {
            file_ = dup(STDOUT_FILENO);
            if (file_ >= 0 && isatty(file_))
                fail(GREEDY_INVALID, "output", "- on a terminal", "a pipe or a redirection");
        } else {
            file_ = open(part().c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        }
        if (file_ < 0) system_failure("output " + name);
    }
    ~Output() {
        if (file_ >= 0) drop();
    }
    Output(const Output&) = delete;
    Output& operator=(const Output&) = delete;

    void write(const void* data, std::size_t size) {
        for (const char* at = static_cast<const char*>(data); size > 0;) {
            const ssize_t count = ::write(file_, at, size);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0 && errno == EPIPE) throw OutputClosed("output: got no reader, expected one");
            if (count < 0) system_failure("output " + name_);
            at += count;
            size -= static_cast<std::size_t>(count);
        }
    }

    void keep() {
        if (::close(std::exchange(file_, -1)) != 0) system_failure("output " + name_);
        if (!name_.empty()) fs::rename(part(), name_);
    }

    void drop() {
        ::close(std::exchange(file_, -1));
        std::error_code ignored;
        if (!name_.empty()) fs::remove(part(), ignored);
    }

    std::string part() const { return part_of(name_); }
    static std::string part_of(const std::string& name) {
        const fs::path path(name);
        return (path.parent_path() / ("." + path.filename().string() + ".part")).string();
    }

  private:
    const std::string name_;
    int file_ = -1;
};

class NullSink : public FrameSink {
  public:
    void write(const std::uint8_t*) override {}
    void close() override {}
};

class ChecksumSink : public FrameSink {
  public:
    explicit ChecksumSink(std::size_t size) : size_(size) {}
    void write(const std::uint8_t* rgb) override { hash_.add(rgb, size_); }
    void close() override {}
    std::string digest() const override { return hash_.hex(); }

  private:
    const std::size_t size_;
    core::Sha256 hash_;
};

class RawSink : public FrameSink {
  public:
    RawSink(const std::string& name, std::size_t size) : output_(name), size_(size) {}
    void write(const std::uint8_t* rgb) override {
        output_.write(rgb, size_);
        empty_ = false;
    }
    void close() override { empty_ ? output_.drop() : output_.keep(); }

  protected:
    Output output_;
    const std::size_t size_;
    bool empty_ = true;
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
        empty_ = false;
    }

  private:
    std::string header_;  // of the file and of the next frame
    std::vector<std::uint8_t> planes_;
};

// An ffmpeg process that reads raw frames from a socket: a write to a pipe whose reader has died raises a signal.
class FfmpegSink : public FrameSink {
  public:
    FfmpegSink(const std::string& name, int width, int height, double fps)
        : name_(name),
          part_(Output::part_of(name)),
          size_(3 * static_cast<std::size_t>(width) * static_cast<std::size_t>(height)) {
        if (width % 2 || height % 2)
            fail(GREEDY_INVALID, "output", std::to_string(width) + "x" + std::to_string(height) + " pixels",
                 "even numbers; .y4m takes any size");
        const auto [rate, base] = fraction(fps);
        const std::string shape = std::to_string(width) + "x" + std::to_string(height);
        const std::string timing = std::to_string(rate) + "/" + std::to_string(base);
        const std::string suffix = fs::path(name).extension().string().substr(1);
        const std::string format = suffix == "mkv" ? "matroska" : suffix;
        std::vector<std::string> words = {"ffmpeg",   "-nostdin", "-loglevel", "error",  "-f", "rawvideo",
                                          "-pix_fmt", "rgb24",    "-s",        shape,    "-r", timing,
                                          "-i",       "pipe:0",   "-pix_fmt",  "yuv420p"};
        if (suffix == "mp4" || suffix == "mov")  // plays up to its last whole frame if the process dies
            words.insert(words.end(), {"-movflags", "frag_every_frame+empty_moov+default_base_moof"});
        words.insert(words.end(), {"-f", format, "-y", part_});
        start(words);
    }

    ~FfmpegSink() override {
        if (process_ <= 0) return;
        kill(process_, SIGKILL);
        finish();
        std::error_code ignored;
        fs::remove(part_, ignored);
    }

    void write(const std::uint8_t* rgb) override {
        std::size_t size = size_;
        for (const std::uint8_t* at = rgb; size > 0;) {
            const ssize_t count = send(socket_, at, size, MSG_NOSIGNAL);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0) fail(GREEDY_FAILED, "ffmpeg", "a process that has ended", "one that reads frames");
            at += count;
            size -= static_cast<std::size_t>(count);
        }
        ++frames_;
    }

    void close() override {
        if (process_ <= 0) return;
        const int status = finish();
        if (frames_ > 0 && status == 0) return fs::rename(part_, name_);
        std::error_code ignored;
        fs::remove(part_, ignored);
        if (frames_ > 0) fail(GREEDY_FAILED, "ffmpeg", "exit status " + std::to_string(status), "0");
    }

  private:
    void start(std::vector<std::string>& words) {
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) system_failure("ffmpeg");
        std::vector<char*> arguments;
        for (std::string& word : words) arguments.push_back(word.data());
        arguments.push_back(nullptr);
        process_ = fork();
        if (process_ == 0) {  // only calls that are safe between fork and exec
            dup2(ends[1], STDIN_FILENO);
            dup2(STDERR_FILENO, STDOUT_FILENO);  // standard output may be the program's own stream
            execvp(arguments[0], arguments.data());
            _exit(127);
        }
        ::close(ends[1]);
        socket_ = ends[0];
        if (process_ < 0) {
            ::close(socket_);
            system_failure("ffmpeg");
        }
    }

    // Closes the input, waits and returns the exit status, which is 127 without an ffmpeg.
    int finish() {
        ::close(socket_);
        int status = 0;
        while (waitpid(process_, &status, 0) < 0 && errno == EINTR) {
        }
        process_ = -1;
        return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
    }

    const std::string name_, part_;
    const std::size_t size_;
    pid_t process_ = -1;
    int socket_ = -1;
    std::uint64_t frames_ = 0;
};

}  // namespace

std::unique_ptr<FrameSink> open_sink(const std::string& target, const std::string& format, int width, int height,
                                     double fps) {
    if (width < 1 || height < 1 || !(fps >= 0.01 && fps <= 1000))
        fail(GREEDY_INVALID, "output", "a size or rate out of range", "pixels and 0.01 to 1000 frames a second");
    if (!format.empty() && target != "-") fail(GREEDY_INVALID, "format", format + " for " + target, "it only for -");
    const std::size_t size = 3 * static_cast<std::size_t>(width) * static_cast<std::size_t>(height);
    if (target == "null") return std::make_unique<NullSink>();
    if (target == "checksum") return std::make_unique<ChecksumSink>(size);
    const std::string kind =
        target != "-" ? fs::path(target).extension().string() : "." + (format.empty() ? "y4m" : format);
    const std::string name = target == "-" ? "" : fs::absolute(target).string();
    std::error_code error;
    if (!name.empty() && !fs::is_directory(fs::path(name).parent_path(), error))
        fail(GREEDY_NOT_FOUND, "output", target, "an existing directory");
    if (kind == ".y4m") return std::make_unique<Y4mSink>(name, width, height, fps);
    if (kind == ".rgb") return std::make_unique<RawSink>(name, size);
    const bool video = kind == ".mp4" || kind == ".mkv" || kind == ".webm" || kind == ".mov";
    if (video && !name.empty()) return std::make_unique<FfmpegSink>(name, width, height, fps);
    fail(GREEDY_INVALID, "output", target, ".y4m, .rgb, .mp4, .mkv, .webm, .mov, null, checksum or - (y4m or rgb)");
}

}  // namespace greedy::host
