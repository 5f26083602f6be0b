#include "host/output.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "greedy/greedy.hpp"
#include "host/sinks.h"

namespace greedy::host {
namespace fs = std::filesystem;
namespace {

bool closed_at_begin[3] = {};

}  // namespace

void hold_standard_streams() {
    for (int number = 0; number < 3; ++number)
        if (fcntl(number, F_GETFD) < 0) {
            closed_at_begin[number] = true;
            open("/dev/null", O_RDWR);  // takes the lowest free number
        }
}

bool was_open(int number) { return !closed_at_begin[number]; }

void check_stdout(const std::string& what, const std::string& target) {
    const auto refuse = [&](const std::string& state) {
        throw StatusError(GREEDY_INVALID, what + ": got " + target + state + ", expected a pipe or a redirection");
    };
    if (!was_open(STDOUT_FILENO)) refuse(" with stdout closed");
    if ((fcntl(STDOUT_FILENO, F_GETFL) & O_ACCMODE) == O_RDONLY) refuse(" with stdout open for reading");
    if (target != "-") return;
    if (isatty(STDOUT_FILENO)) refuse(" on a terminal");
    pollfd one{STDOUT_FILENO, 0, 0};
    if (poll(&one, 1, 0) > 0 && (one.revents & POLLERR)) throw OutputClosed("output: got no reader, expected one");
}

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

void publish(Part& part, const std::string& asked, std::vector<std::string>& notes) {
    bool older = false;
    if (!part.replace(older)) output_failure(asked);
    if (older) notes.push_back("replaced the older " + shown(part.target()));
}

void output_failure(const std::string& asked) {
    const int reason = errno;
    throw StatusError(GREEDY_FAILED, "output: got " + std::string(std::strerror(reason)) + " for " + shown(asked) +
                                         ", expected it to be written");
}

Output::Output(const std::string& asked, std::vector<std::string>& notes) : notes_(notes), asked_(asked) {
    if (asked == "-") {
        check_stdout("output", asked);
        file_ = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3);
    } else {
        part_ = reserve(asked, notes);
        file_ = open(part_->path().c_str(), O_WRONLY | O_CLOEXEC);
    }
    if (file_ < 0) output_failure(asked_);
}

Output::~Output() {
    if (file_ >= 0) ::close(file_);
}

void Output::write(const void* data, std::size_t size) {
    for (const char* at = static_cast<const char*>(data); size > 0;) {
        const ssize_t count = ::write(file_, at, size);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0 && errno == EAGAIN) {  // a pipe that does not block, and is full
            pollfd one{file_, POLLOUT, 0};
            poll(&one, 1, -1);
            continue;
        }
        if (count < 0 && errno == EPIPE) throw OutputClosed("output: got no reader, expected one");
        if (count < 0) output_failure(asked_);
        at += count;
        size -= static_cast<std::size_t>(count);
        sent_ += count;
    }
}

void Output::keep() {
    if (::close(std::exchange(file_, -1)) != 0) output_failure(asked_);
    if (part_ && whole_ == 0) part_->drop();
    if (part_ && whole_ > 0) publish(*part_, asked_, notes_);
}

std::string Output::rescue() {
    if (!part_) return {};
    if (file_ >= 0 && ftruncate(file_, whole_) == 0) ::close(std::exchange(file_, -1));
    if (whole_ > 0) return part_->keep();
    part_->drop();
    return {};
}

}  // namespace greedy::host
