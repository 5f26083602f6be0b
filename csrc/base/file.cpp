#include "base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace greedy::core {

MappedFile::MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (file < 0 && errno == ENOENT) fail(GREEDY_NOT_FOUND, path, "no such file", "one");
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0 || !S_ISREG(info.st_mode)) {
        const std::string reason = file < 0 ? std::strerror(errno) : "no plain file";
        if (file >= 0) ::close(file);
        fail(GREEDY_BAD_BUNDLE, path, reason, "a plain file that can be read");
    }
    size_ = static_cast<std::size_t>(info.st_size);
    void* mapped = size_ ? mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0) : nullptr;
    ::close(file);
    if (mapped == MAP_FAILED) fail(GREEDY_NO_MEMORY, path, std::strerror(errno), "memory to map it");
    data_ = static_cast<const unsigned char*>(mapped);
}

MappedFile::~MappedFile() {
    if (data_) munmap(const_cast<unsigned char*>(data_), size_);
}

}  // namespace greedy::core
