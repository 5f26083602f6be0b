#include "host/part.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <random>

#include "base/error.h"
#include "greedy/greedy.hpp"

namespace greedy::host {
namespace {
namespace fs = std::filesystem;

constexpr std::size_t kNameBytes = 255, kTokenBytes = 8;
const std::string kSuffix = ".part";

[[noreturn]] void fail(int status, const std::string& name, const std::string& expected) {
    throw StatusError(status, "output: got " + shown(name) + ", expected " + expected);
}

// The file that a name means, which need not exist. A circle of links stays a link.
std::string resolved(const std::string& name) {
    std::error_code error;
    fs::path path = fs::absolute(name);
    for (int i = 0; i < 40 && fs::is_symlink(path, error); ++i) path = path.parent_path() / fs::read_symlink(path, error);
    const fs::path folder = fs::weakly_canonical(path.parent_path(), error);
    return (error ? path : folder / path.filename()).string();
}

// The name stem + rest, with the stem cut where a file system would refuse so many bytes.
std::string short_name(const std::string& stem, const std::string& rest) {
    return stem.substr(0, kNameBytes - rest.size()) + rest;
}

std::string token() {
    static std::random_device random;
    char text[kTokenBytes + 1];
    std::snprintf(text, sizeof text, "%08x", static_cast<unsigned>(random()));
    return text;
}

std::string beside(const std::string& target, const std::string& name) {
    return (fs::path(target).parent_path() / name).string();
}

std::string hidden(const std::string& target) { return "." + fs::path(target).filename().string(); }

// An empty file that was not there before; -1 otherwise.
int create(const std::string& path) { return open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666); }

bool is_at(int file, const std::string& path) {
    struct stat held, there;
    return fstat(file, &held) == 0 && stat(path.c_str(), &there) == 0 && held.st_ino == there.st_ino &&
           held.st_dev == there.st_dev;
}

bool is_free(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) return false;
    const bool free = flock(file, LOCK_EX | LOCK_NB) == 0 && is_at(file, path);
    close(file);
    return free;
}

}  // namespace

std::string shown(const std::string& name) { return core::one_line(name); }

Part::Part(const std::string& name) : target_(resolved(name)) {
    while (lock_ < 0) {
        path_ = beside(target_, short_name(hidden(target_), "." + token() + kSuffix));
        lock_ = create(path_);
        if (lock_ < 0 && errno == EEXIST) continue;
        if (lock_ < 0) {
            const bool place = errno == ENOENT || errno == EROFS || errno == EACCES || errno == EPERM ||
                               errno == ENAMETOOLONG || errno == EINVAL;
            fail(place ? GREEDY_INVALID : GREEDY_FAILED, fs::absolute(name).string(),
                 std::string("a place for a new file (") + std::strerror(errno) + ")");
        }
        flock(lock_, LOCK_EX);
        if (is_at(lock_, path_)) break;
        release();  // another process took it for a left one before it was locked
    }
}

Part::~Part() { release(); }

void Part::release() {
    if (lock_ >= 0) ::close(lock_);
    lock_ = -1;
}

bool Part::replace(bool& older) {
    std::error_code error;
    older = fs::exists(target_, error);
    if (std::rename(path_.c_str(), target_.c_str()) != 0) return false;
    path_ = target_;
    release();
    return true;
}

std::string Part::keep() {
    const fs::path target(target_);
    for (int i = -1; i < 1000; ++i) {
        const std::string number = i > 0 ? "-" + std::to_string(i) : "";
        const std::string spare = short_name(target.stem().string(), ".kept" + number + target.extension().string());
        const std::string name = i < 0 ? target_ : beside(target_, spare);
        const int file = create(name);
        if (file < 0 && errno == EEXIST) continue;
        if (file < 0) break;  // such as in a directory that is gone: the temporary name is better than nothing
        ::close(file);
        if (std::rename(path_.c_str(), name.c_str()) == 0)
            path_ = name;
        else
            std::remove(name.c_str());
        break;
    }
    release();
    return path_;
}

void Part::drop() {
    std::remove(path_.c_str());
    release();
}

std::vector<std::string> left_over(const std::string& name) {
    const std::string target = resolved(name), start = short_name(hidden(target), "." + token() + kSuffix);
    const std::string stem = start.substr(0, start.size() - kTokenBytes - kSuffix.size());  // ends with a dot
    std::vector<std::string> found;
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(fs::path(target).parent_path(), error)) {
        const std::string other = entry.path().filename().string();
        const bool ours = other.size() == start.size() && other.compare(0, stem.size(), stem) == 0 &&
                          other.compare(other.size() - kSuffix.size(), kSuffix.size(), kSuffix) == 0;
        if (ours && entry.is_regular_file(error) && is_free(entry.path().string()))
            found.push_back(entry.path().string());
    }
    std::sort(found.begin(), found.end());
    return found;
}

void check_place(const std::string& asked) {
    if (asked.empty()) throw StatusError(GREEDY_INVALID, "output: got an empty name, expected a file name");
    const std::string name = fs::absolute(asked).string();
    const std::size_t length = fs::path(name).filename().string().size();
    if (length > kNameBytes)
        fail(GREEDY_INVALID, "a name of " + std::to_string(length) + " bytes", "at most " + std::to_string(kNameBytes));
    const fs::path target(resolved(name)), folder = target.parent_path();
    std::error_code error;
    struct stat about;
    if (fs::is_symlink(target, error)) fail(GREEDY_INVALID, name + ", a link to itself", "a link to a file");
    if (stat(folder.c_str(), &about) != 0) {
        const std::string reason = std::string(" (") + std::strerror(errno) + ")";
        if (errno == ENOENT || errno == ENOTDIR)
            fail(GREEDY_NOT_FOUND, name, "an existing directory " + shown(folder.string()));
        fail(GREEDY_INVALID, name, (errno == ENAMETOOLONG ? "a shorter path" : "a place for a new file") + reason);
    }
    if (!S_ISDIR(about.st_mode)) fail(GREEDY_INVALID, name, shown(folder.string()) + " to be a directory");
    if (access(folder.c_str(), W_OK | X_OK) != 0)
        fail(GREEDY_INVALID, name, "a directory that can be written, " + shown(folder.string()) + " cannot");
    if (stat(target.c_str(), &about) != 0) return;
    if (S_ISDIR(about.st_mode)) fail(GREEDY_INVALID, name + ", which is a directory", "a file name");
    if (!S_ISREG(about.st_mode))
        fail(GREEDY_INVALID, name + ", a device or pipe", "a file name; use - for a pipe, null for nothing");
    if (access(target.c_str(), W_OK) != 0)
        fail(GREEDY_INVALID, name + ", which is write-protected", "a file to replace");
}

}  // namespace greedy::host
