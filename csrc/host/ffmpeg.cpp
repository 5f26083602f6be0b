#include "host/ffmpeg.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

#include "greedy/greedy.hpp"
#include "host/output.h"
#include "host/part.h"

namespace greedy::host {
namespace {
namespace fs = std::filesystem;

[[noreturn]] void fail(int status, const std::string& what, const std::string& got, const std::string& expected) {
    throw StatusError(status, what + ": got " + got + ", expected " + expected);
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

// What a process says on its stderr: the end of a pipe, and the first line of it once the process has ended.
struct Said {
    int end = -1;
    std::string text;
};

// The first ffmpeg in PATH that can be run; empty without one.
std::string find_ffmpeg() {
    const char* path = std::getenv("PATH");
    std::istringstream folders(path ? path : "/bin:/usr/bin");
    for (std::string folder; std::getline(folders, folder, ':');) {
        const std::string program = (folder.empty() ? "." : folder) + "/ffmpeg";
        std::error_code error;
        if (fs::is_regular_file(program, error) && access(program.c_str(), X_OK) == 0) return program;
    }
    return {};
}

// Starts ffmpeg in a process group of its own, so that Ctrl-C in a terminal does not end it before its input does.
// input: its standard input; -1 for none. said: gets the reading end of a pipe that takes its messages. It never makes
// ffmpeg wait: what does not fit is lost. Returns the process; -1, with errno, if there is none.
pid_t start_ffmpeg(const std::string& program, std::vector<std::string> words, int input, int& said) {
    words.insert(words.begin(), {"ffmpeg", "-nostdin", "-loglevel", "error"});
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    int ends[2];
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return -1;
    const int nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
    const pid_t process = fork();
    if (process == 0) {  // only calls that are safe between fork and exec
        setpgid(0, 0);
        dup2(input >= 0 ? input : nothing, STDIN_FILENO);
        dup2(ends[1], STDERR_FILENO);
        dup2(ends[1], STDOUT_FILENO);  // standard output may be the program's own stream
        execv(program.c_str(), arguments.data());
        _exit(127);
    }
    const int reason = errno;
    ::close(nothing);
    ::close(ends[1]);
    if (process < 0) ::close(ends[0]);
    said = process < 0 ? -1 : ends[0];
    errno = reason;
    return process;
}

volatile std::sig_atomic_t running = 0;  // the process of an ffmpeg that has not been waited for
volatile std::sig_atomic_t urged = 0;    // how often it was

// The first line in a pipe, which it closes, with the name that the user gave in place of the temporary one.
std::string first_line(int& end, const std::string& temporary, const std::string& asked) {
    std::string text(4096, '\0');
    ssize_t size = -1;
    while (end >= 0 && (size = read(end, text.data(), text.size())) < 0 && errno == EINTR) {
    }
    if (end >= 0) ::close(std::exchange(end, -1));
    text.resize(size > 0 ? static_cast<std::size_t>(size) : 0);
    text = text.substr(0, text.find('\n'));
    if (!text.empty() && text[0] == '[' && text.find("] ") != text.npos) text.erase(0, text.find("] ") + 2);
    const std::string file = fs::path(temporary).filename().string();
    for (const std::string& name : {temporary, file})
        for (std::size_t at; !name.empty() && (at = text.find(name)) != text.npos;)
            text.replace(at, name.size(), asked.find(file) == asked.npos ? asked : "it");
    return shown(text);
}

// Waits and returns the exit status, or 256 + the number of the signal that ended the process.
int status_of(pid_t process) {
    int status = 0;
    siginfo_t ended;
    while (waitid(P_PID, static_cast<id_t>(process), &ended, WEXITED | WNOWAIT) < 0 && errno == EINTR) {
    }
    running = 0;  // from here on another process may get its number
    while (waitpid(process, &status, 0) < 0 && errno == EINTR) {
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 256 + WTERMSIG(status);
}

// An ffmpeg process that reads raw frames from a socket: a write to a pipe whose reader has died raises a signal.
class FfmpegSink : public FrameSink {
  public:
    FfmpegSink(const std::string& asked, const std::string& kind, int width, int height, double fps)
        : size_(3 * static_cast<std::size_t>(width) * static_cast<std::size_t>(height)),
          asked_(asked),
          program_(find_ffmpeg()),
          format_(kind == "mkv" ? "matroska" : kind),
          fragmented_(kind == "mp4" || kind == "mov") {
        if (program_.empty())
            fail(GREEDY_INVALID, kind + " output", "no program ffmpeg in PATH",
                 "it installed; .y4m and .rgb need no program");
        if (width % 2 || height % 2)
            fail(GREEDY_INVALID, kind + " output",
                 std::to_string(width) + "x" + std::to_string(height) + " pixels in yuv420p",
                 "even numbers; .y4m takes any size");
        const auto [rate, base] = fraction(fps);
        part_ = reserve(asked, notes_);
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
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) output_failure(asked_);
        socket_ = ends[0];
        process_ = start(words, ends[1], said_);
        ::close(ends[1]);
    }

    ~FfmpegSink() override { FfmpegSink::abort(); }

    void write(const std::uint8_t* rgb) override {
        std::size_t size = size_;
        for (const std::uint8_t* at = rgb; size > 0;) {
            const ssize_t count = send(socket_, at, size, MSG_NOSIGNAL);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0) failure(finish());
            at += count;
            size -= static_cast<std::size_t>(count);
        }
        ++frames_;
    }

    void close() override {
        if (process_ <= 0) return;
        const int status = finish();
        if (frames_ == 0) return part_->drop();
        if (status != 0) failure(status);
        if (!said_.text.empty()) notes_.push_back("ffmpeg says: " + said_.text);
        if (fragmented_ && !urged) improve();
        publish(*part_, asked_, notes_);
        part_.reset();
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
    // Returns the exit status; said_ then holds ffmpeg's first line.
    int finish() {
        ::close(socket_);
        const int status = status_of(std::exchange(process_, -1));
        said_.text = first_line(said_.end, part_->path(), asked_);
        return status;
    }

    [[noreturn]] void failure(int status) {
        if (urged) fail(GREEDY_FAILED, "ffmpeg", "a second signal before the end of " + shown(asked_), "it to read all frames");
        const std::string why = said_.text.empty() ? "" : " (" + said_.text + ")";
        const std::string end = status > 255 ? "signal " + std::to_string(status - 256) : "exit status " + std::to_string(status);
        fail(GREEDY_FAILED, "ffmpeg", end + " for " + shown(asked_) + why, "it to read all frames");
    }

    // Starts a process; `said` gets the end of the pipe that holds its messages.
    pid_t start(std::vector<std::string> words, int input, Said& said) {
        const pid_t process = start_ffmpeg(program_, std::move(words), input, said.end);
        if (process < 0) output_failure(asked_);
        running = process;
        return process;
    }

    // Copies the packets into an ordinary file, with its index in front. If that fails, the recording is the result.
    void improve() {
        try {
            auto whole = std::make_unique<Part>(part_->target());
            Said said;
            const int status = status_of(start({"-i", part_->path(), "-c", "copy", "-movflags", "+faststart", "-f",
                                                format_, "-y", whole->path()}, -1, said));
            first_line(said.end, "", "");  // a copy that fails has a note of its own
            if (status == 0 && is_ordinary_mp4(whole->path())) return std::exchange(part_, std::move(whole))->drop();
            whole->drop();
        } catch (const std::exception&) {
        }
        notes_.push_back("the " + format_ + " stays fragmented, it plays but has no index");
    }

    const std::size_t size_;
    const std::string asked_, program_, format_;
    const bool fragmented_;
    Said said_;
    std::unique_ptr<Part> part_;
    pid_t process_ = -1;
    int socket_ = -1;
    std::uint64_t frames_ = 0;
};

}  // namespace

void urge_ffmpeg(int) {
    const int reason = errno;
    if (running > 0) {
        if (urged > 0) kill(running, urged > 1 ? SIGKILL : SIGTERM);
        urged = urged + 1;
        alarm(1);
    }
    errno = reason;
}

bool is_video(const std::string& kind) { return kind == "mp4" || kind == "mkv" || kind == "webm" || kind == "mov"; }

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

std::unique_ptr<FrameSink> open_ffmpeg(const std::string& asked, const std::string& kind, int width, int height,
                                       double fps) {
    return std::make_unique<FfmpegSink>(asked, kind, width, height, fps);
}

}  // namespace greedy::host
