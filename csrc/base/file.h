// Files as memory: mapped read-only, never followed out of the bundle.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace greedy::core {

class MappedFile {
  public:
    // A plain file, no symbolic link; throws Error(GREEDY_NOT_FOUND or GREEDY_BAD_BUNDLE).
    explicit MappedFile(const std::string& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const unsigned char* data() const { return data_; }
    std::size_t size() const { return size_; }
    std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

  private:
    const unsigned char* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace greedy::core
