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
#include <fstream>
#include <utility>
#include <vector>

#include "base/sha256.h"
#include "greedy/greedy.hpp"
#include "host/part.h"

namespace greedy::host {
namespace {
namespace fs = std::filesystem;

[[noreturn]] void fail(int status, const std::string& what, const std::string& got, const std::string& expected) {
    throw StatusError(status, what + ": got " + got + ", expected " + expected);
}

[[noreturn]] void system_failure(const std::string& what) {
    fail(GREEDY_FAILED, what, std::strerror(errno), "it to work");
}

// A temporary file, with a note on what killed processes left for the same name.
std::unique_ptr<Part> reserve(const std::string& name, std::vector<std::string>& notes) {
    std::error_code error;
    for (const std::string& part : left_over(name)) {
        if (fs::file_size(part, error) == 0)
            fs::remove(part, error);
        else
            notes.push_back("an earlier run was killed and left " + shown(part) + ": rename or delete it");
    }
    return std::make_unique<Part>(name);
}

void publish(Part& part, std::vector<std::string>& notes) {
    if (part.replace()) notes.push_back("replaced the older " + shown(part.target()));
}

// Whether a file is an mp4 whose boxes are whole, with one moov ahead of one mdat.
bool is_ordinary_mp4(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string order;
    unsigned char head[16];
    for (std::uint64_t at = 0;;) {
        file.seekg(static_cast<std::streamoff>(at));
        if (!file.read(reinterpret_cast<char*>(head), 8)) {
            std::error_code error;
            return order == "moov mdat " && at == fs::file_size(path, error);
        }
        std::uint64_t size = 0;
        for (int i = 0; i < 4; ++i) size = size << 8 | head[i];
        if (size == 1) {
            if (!file.read(reinterpret_cast<char*>(head) + 8, 8)) return false;
            size = 0;
            for (int i = 8; i < 16; ++i) size = size << 8 | head[i];
        }
        const std::string kind(reinterpret_cast<char*>(head) + 4, 4);
        if (size < 8) return false;
        if (kind == "moov" || kind == "mdat" || kind == "moof") order += kind + " ";
        at += size;
    }
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
    Output(const std::string& name, std::vector<std::string>& notes) : notes_(notes) {
        if (name.empty()) {
            file_ = dup(STDOUT_FILENO);
            if (file_ >= 0 && isatty(file_))
                fail(GREEDY_INVALID, "output", "- on a terminal", "a pipe or a redirection");
        } else {
            part_ = reserve(name, notes);
            file_ = open(part_->path().c_str(), O_WRONLY | O_CLOEXEC);
        }
        if (file_ < 0) system_failure("output " + shown(name));
    }
    ~Output() {
        if (file_ >= 0) ::close(file_);
    }
    Output(const Output&) = delete;
    Output& operator=(const Output&) = delete;

    void write(const void* data, std::size_t size) {
        for (const char* at = static_cast<const char*>(data); size > 0;) {
            const ssize_t count = ::write(file_, at, size);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0 && errno == EPIPE) throw OutputClosed("output: got no reader, expected one");
            if (count < 0) system_failure("output" + (part_ ? " " + shown(part_->target()) : std::string()));
            at += count;
            size -= static_cast<std::size_t>(count);
            sent_ += count;
        }
    }

    // All that was written so far is worth keeping.
    void mark() { whole_ = sent_; }

    void keep() {
        if (::close(std::exchange(file_, -1)) != 0) system_failure("output");
        if (part_ && whole_ == 0) part_->drop();
        if (part_ && whole_ > 0) publish(*part_, notes_);
    }

    // Keeps what was there at the last mark, under a name that nothing has; empty if that is nothing.
    std::string rescue() {
        if (!part_) return {};
        if (file_ >= 0 && ftruncate(file_, whole_) == 0) ::close(std::exchange(file_, -1));
        if (whole_ > 0) return part_->keep();
        part_->drop();
        return {};
    }

  private:
    std::vector<std::string>& notes_;
    std::unique_ptr<Part> part_;
    int file_ = -1;
    off_t sent_ = 0, whole_ = 0;
};

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

// Starts ffmpeg in a process group of its own, so that Ctrl-C in a terminal does not end it before its input does.
// input: its standard input; -1 for none. Returns the process.
pid_t start_ffmpeg(std::vector<std::string> words, int input) {
    words.insert(words.begin(), {"ffmpeg", "-nostdin", "-loglevel", "error"});
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    const int nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
    const pid_t process = fork();
    if (process == 0) {  // only calls that are safe between fork and exec
        setpgid(0, 0);
        dup2(input >= 0 ? input : nothing, STDIN_FILENO);
        dup2(STDERR_FILENO, STDOUT_FILENO);  // standard output may be the program's own stream
        execvp(arguments[0], arguments.data());
        _exit(127);
    }
    const int reason = errno;
    ::close(nothing);
    errno = reason;
    if (process < 0) system_failure("ffmpeg");
    return process;
}

// Waits and returns the exit status, which is 127 without an ffmpeg.
int status_of(pid_t process) {
    int status = 0;
    while (waitpid(process, &status, 0) < 0 && errno == EINTR) {
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

// An ffmpeg process that reads raw frames from a socket: a write to a pipe whose reader has died raises a signal.
class FfmpegSink : public FrameSink {
  public:
    FfmpegSink(const std::string& name, int width, int height, double fps)
        : size_(3 * static_cast<std::size_t>(width) * static_cast<std::size_t>(height)) {
        if (width % 2 || height % 2)
            fail(GREEDY_INVALID, "output", std::to_string(width) + "x" + std::to_string(height) + " pixels",
                 "even numbers; .y4m takes any size");
        const auto [rate, base] = fraction(fps);
        const std::string suffix = fs::path(name).extension().string().substr(1);
        format_ = suffix == "mkv" ? "matroska" : suffix;
        fragmented_ = suffix == "mp4" || suffix == "mov";
        part_ = reserve(name, notes_);
        std::vector<std::string> words = {"-f", "rawvideo", "-pix_fmt", "rgb24",
            "-s", std::to_string(width) + "x" + std::to_string(height),
            "-r", std::to_string(rate) + "/" + std::to_string(base), "-i", "pipe:0",
            // The file says which matrix, range, primaries and transfer its pixels have.
            "-vf", "scale=out_color_matrix=bt709:out_range=tv,"
                   "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv",
            "-pix_fmt", "yuv420p", "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709",
            "-color_range", "tv"};
        if (fragmented_)  // plays up to its last whole frame if the process dies
            words.insert(words.end(), {"-movflags", "frag_every_frame+empty_moov+default_base_moof"});
        words.insert(words.end(), {"-f", format_, "-y", part_->path()});
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) system_failure("ffmpeg");
        socket_ = ends[0];
        process_ = start_ffmpeg(words, ends[1]);
        ::close(ends[1]);
    }

    ~FfmpegSink() override { FfmpegSink::abort(); }

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
        if (frames_ == 0) return part_->drop();
        if (status != 0) fail(GREEDY_FAILED, "ffmpeg", "exit status " + std::to_string(status), "0");
        if (fragmented_) improve();
        publish(*std::exchange(part_, nullptr), notes_);
    }

    // ffmpeg ends the file as after the last frame. What it wrote is kept if it wrote anything.
    std::string abort() override {
        if (process_ > 0) finish();
        const std::unique_ptr<Part> part = std::exchange(part_, nullptr);
        std::error_code error;
        if (part && frames_ > 0 && fs::file_size(part->path(), error) > 0 && !error) return part->keep();
        if (part) part->drop();
        return {};
    }

  private:
    int finish() {
        ::close(socket_);
        return status_of(std::exchange(process_, -1));
    }

    // Copies the packets into an ordinary file, with its index in front. If that fails, the recording is the result.
    void improve() {
        try {
            auto whole = std::make_unique<Part>(part_->target());
            const int status = status_of(start_ffmpeg({"-i", part_->path(), "-c", "copy", "-movflags", "+faststart",
                                                       "-f", format_, "-y", whole->path()}, -1));
            if (status == 0 && is_ordinary_mp4(whole->path())) return std::exchange(part_, std::move(whole))->drop();
            whole->drop();
        } catch (const std::exception&) {
        }
        notes_.push_back("the " + format_ + " stays fragmented, it plays but has no index");
    }

    const std::size_t size_;
    std::string format_;
    bool fragmented_ = false;
    std::unique_ptr<Part> part_;
    pid_t process_ = -1;
    int socket_ = -1;
    std::uint64_t frames_ = 0;
};

bool is_video(const std::string& kind) {
    return kind == ".mp4" || kind == ".mkv" || kind == ".webm" || kind == ".mov";
}

std::string kind_of(const std::string& target, const std::string& format) {
    return target != "-" ? fs::path(target).extension().string() : "." + (format.empty() ? "y4m" : format);
}

}  // namespace

void check_target(const std::string& target, const std::string& format) {
    if (!format.empty() && target != "-")
        fail(GREEDY_INVALID, "format", format + " for " + shown(target), "it only for -");
    if (target == "null" || target == "checksum") return;
    const std::string kind = kind_of(target, format);
    if (kind != ".y4m" && kind != ".rgb" && !(is_video(kind) && target != "-"))
        fail(GREEDY_INVALID, "output", shown(target),
             ".y4m, .rgb, .mp4, .mkv, .webm, .mov, null, checksum or - (y4m or rgb)");
    if (target != "-") check_place(target);
}

std::unique_ptr<FrameSink> open_sink(const std::string& target, const std::string& format, int width, int height,
                                     double fps) {
    if (width < 1 || height < 1 || !(fps >= 0.01 && fps <= 1000))
        fail(GREEDY_INVALID, "output", "a size or rate out of range", "pixels and 0.01 to 1000 frames a second");
    check_target(target, format);
    const std::size_t size = 3 * static_cast<std::size_t>(width) * static_cast<std::size_t>(height);
    if (target == "null") return std::make_unique<NullSink>();
    if (target == "checksum") return std::make_unique<ChecksumSink>(size);
    const std::string kind = kind_of(target, format), name = target == "-" ? "" : fs::absolute(target).string();
    if (kind == ".y4m") return std::make_unique<Y4mSink>(name, width, height, fps);
    if (kind == ".rgb") return std::make_unique<RawSink>(name, size);
    return std::make_unique<FfmpegSink>(name, width, height, fps);
}

}  // namespace greedy::host
