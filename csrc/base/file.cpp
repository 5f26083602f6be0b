#include "base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace greedy::core {
namespace {

bool same_content(const struct stat& a, const struct stat& b) {
    return a.st_size == b.st_size && a.st_mtim.tv_sec == b.st_mtim.tv_sec && a.st_mtim.tv_nsec == b.st_mtim.tv_nsec;
}

}  // namespace

FileBytes::FileBytes(const std::string& path) : path_(path) {
    file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (file_ < 0 && errno == ENOENT) fail(GREEDY_NOT_FOUND, path, "no such file", "one");
    try {
        if (file_ < 0 || fstat(file_, &info_) != 0 || !S_ISREG(info_.st_mode))
            fail(GREEDY_BAD_BUNDLE, path, file_ < 0 ? std::strerror(errno) : "no plain file",
                 "a plain file that can be read");
        size_ = static_cast<std::size_t>(info_.st_size);
        map();
    } catch (...) {
        if (data_) munmap(const_cast<unsigned char*>(data_), size_);
        if (file_ >= 0) ::close(file_);
        throw;
    }
}

FileBytes::~FileBytes() {
    if (data_) munmap(const_cast<unsigned char*>(data_), size_);
    ::close(file_);
}

void FileBytes::map() {
    copied_ = size_ <= kMostCopied;
    if (size_ == 0) return;
    const int access = copied_ ? PROT_READ | PROT_WRITE : PROT_READ;
    void* mapped = mmap(nullptr, size_, access, MAP_PRIVATE | (copied_ ? MAP_ANONYMOUS : 0), copied_ ? -1 : file_, 0);
    if (mapped == MAP_FAILED) fail(GREEDY_NO_MEMORY, path_, std::strerror(errno), "memory for it");
    data_ = static_cast<const unsigned char*>(mapped);
    if (copied_) fill(static_cast<unsigned char*>(mapped));
}

void FileBytes::fill(unsigned char* memory) {
    for (std::size_t done = 0; done < size_;) {
        const ssize_t count = read(file_, memory + done, size_ - done);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) fail(GREEDY_BAD_BUNDLE, path_, std::strerror(errno), "a plain file that can be read");
        if (count == 0) refuse_change();
        done += static_cast<std::size_t>(count);
    }
}

void FileBytes::check_unchanged() const {
    struct stat now;
    if (!copied_ && (fstat(file_, &now) != 0 || !same_content(info_, now))) refuse_change();
}

void FileBytes::check_in_place() const {
    struct stat now;
    const bool same = lstat(path_.c_str(), &now) == 0 && now.st_dev == info_.st_dev && now.st_ino == info_.st_ino;
    if (!same || !same_content(info_, now)) refuse_change();
}

void FileBytes::refuse_change() const {
    fail(GREEDY_BAD_BUNDLE, path_, "a file that changed while it was open", "the same as before");
}

}  // namespace greedy::core
