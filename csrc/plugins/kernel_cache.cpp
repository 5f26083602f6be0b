#include "kernel_cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "base/error.h"
#include "base/file.h"
#include "base/sha256.h"

namespace greedy::plugin {
namespace {
namespace fs = std::filesystem;

std::string hash(std::string_view first, std::string_view second = {}) {
    core::Sha256 sum;
    for (const std::string_view part : {first, second})
        sum.add(reinterpret_cast<const unsigned char*>(part.data()), part.size());
    return sum.hex();
}

// Plans are gigabytes, so this reads both ends only. A wrong file costs a compilation: the library looks kernels up.
std::string name_of(std::string_view plan) {
    const std::size_t part = std::min<std::size_t>(plan.size(), std::size_t{1} << 20);
    const std::string ends = hash(plan.substr(0, part), plan.substr(plan.size() - part));
    return ends.substr(0, 32) + "-" + std::to_string(plan.size()) + ".kernels";
}

// Holds a file that a writer fills before it gets its final name. Writers of one file take turns by its lock.
class Growing {
  public:
    explicit Growing(const std::string& path)
        : path_(path), file_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600)) {}
    ~Growing() {
        if (file_ >= 0) close(file_);
    }
    Growing(const Growing&) = delete;
    Growing& operator=(const Growing&) = delete;

    // False while another process writes it, or once that has renamed it.
    bool ours() const {
        struct stat held, there;
        return flock(file_, LOCK_EX | LOCK_NB) == 0 && fstat(file_, &held) == 0 && stat(path_.c_str(), &there) == 0 &&
               held.st_ino == there.st_ino && held.st_dev == there.st_dev;
    }
    bool fill(const char* data, std::size_t size) const {
        if (ftruncate(file_, 0) != 0) return false;
        while (size > 0) {
            const ssize_t written = write(file_, data, size);
            if (written < 0 && errno == EINTR) continue;
            if (written <= 0) return false;
            data += written, size -= static_cast<std::size_t>(written);
        }
        return fsync(file_) == 0;
    }
    explicit operator bool() const { return file_ >= 0; }

  private:
    const std::string path_;
    const int file_;
};

// False, with errno, if the file cannot be written; its older content is then still there.
bool replace(const std::string& path, const char* data, std::size_t size) {
    std::error_code error;
    const fs::path folder = fs::path(path).parent_path();
    fs::create_directories(folder, error);
    if (!error) fs::permissions(folder, fs::perms::owner_all, error);  // kernels are code
    if (error) return errno = error.value(), false;
    const std::string part = path + ".part";
    const Growing file(part);
    if (!file) return false;
    if (!file.ours()) return true;  // another process keeps the same kernels
    if (file.fill(data, size) && std::rename(part.c_str(), path.c_str()) == 0) return true;
    const int reason = errno;
    std::remove(part.c_str());
    errno = reason;
    return false;
}

}  // namespace

std::string cache_folder() {
    const auto set = [](const char* name) { return std::string(std::getenv(name) ? std::getenv(name) : ""); };
    if (std::getenv("GREEDY_CACHE")) return set("GREEDY_CACHE");
    for (const std::string& folder : {set("XDG_CACHE_HOME"), set("HOME").empty() ? "" : set("HOME") + "/.cache"})
        if (!folder.empty() && folder[0] == '/') return folder + "/greedy-stream";
    return "";
}

KernelCache::KernelCache(nvinfer1::ICudaEngine& engine, std::string_view plan, nvinfer1::ILogger& log)
    : engine_(engine), log_(log) {
    const std::string folder = cache_folder();
    if (!folder.empty()) path_ = folder + "/tensorrt_rtx/" + name_of(plan);
}

KernelCache::~KernelCache() {
    try {
        keep();
    } catch (const std::exception&) {  // out of memory: the kernels are compiled again
    }
}

nvinfer1::IExecutionContext* KernelCache::new_context() {
    if (path_.empty()) return engine_.createExecutionContext();
    std::unique_ptr<nvinfer1::IRuntimeConfig> config(engine_.createRuntimeConfig());
    if (config && !cache_) {
        cache_.reset(config->createRuntimeCache());
        if (cache_) read();
    }
    if (!config || !cache_ || !config->setRuntimeCache(*cache_)) {
        say("got no place for compiled kernels from TensorRT for RTX, so none are kept");
        path_.clear();
        return engine_.createExecutionContext();
    }
    configs_.push_back(std::move(config));
    return engine_.createExecutionContext(configs_.back().get());
}

void KernelCache::read() {
    std::error_code error;
    if (!fs::exists(fs::symlink_status(path_, error))) return;
    try {
        const core::FileBytes file(path_);
        if (file.size() > 0 && cache_->deserialize(file.data(), file.size()))
            content_ = hash(file.text());
        else
            say(path_ + ": got kernels of another GPU or version, or damaged ones, so they are compiled again");
    } catch (const core::Error& failure) {
        say(failure.what());
    }
}

void KernelCache::save() {
    if (keep()) return;
    say(path_ + ": got " + std::strerror(errno) + ", expected a place to keep compiled kernels");
    path_.clear();  // said once
}

bool KernelCache::keep() {
    if (path_.empty() || !cache_) return true;
    const std::unique_ptr<nvinfer1::IHostMemory> kernels(cache_->serialize());
    if (!kernels || kernels->size() == 0) return true;
    const std::string_view made(static_cast<const char*>(kernels->data()), kernels->size());
    const std::string content = hash(made);
    if (content != content_ && !replace(path_, made.data(), made.size())) return false;
    content_ = content;
    return true;
}

}  // namespace greedy::plugin
