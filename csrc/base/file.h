// The bytes of a file, read-only, never followed out of the bundle. Small files are copied. Large ones are mapped, so
// that processes share them; a process dies (SIGBUS) that reads what another one cuts off from a mapped file.
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <string>
#include <string_view>

namespace greedy::core {

class FileBytes {
  public:
    static constexpr std::size_t kMostCopied = std::size_t{64} << 20;

    // A plain file, no symbolic link; throws Error(GREEDY_NOT_FOUND or GREEDY_BAD_BUNDLE).
    explicit FileBytes(const std::string& path);
    ~FileBytes();
    FileBytes(const FileBytes&) = delete;
    FileBytes& operator=(const FileBytes&) = delete;

    const unsigned char* data() const { return data_; }
    std::size_t size() const { return size_; }
    std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

    // Throws Error(GREEDY_BAD_BUNDLE) where a mapped file was written to since. Costs a system call.
    void check_unchanged() const;
    // The same for any file, and where its path names another one by now.
    void check_in_place() const;

  private:
    void map();
    void fill(unsigned char* memory);
    [[noreturn]] void refuse_change() const;

    const std::string path_;
    int file_ = -1;
    struct stat info_ {};
    const unsigned char* data_ = nullptr;
    std::size_t size_ = 0;
    bool copied_ = false;
};

}  // namespace greedy::core
