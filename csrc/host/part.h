// A file that grows beside its final name, under a temporary name of its own: `.<name>.<token>.part`. The process locks
// it while it lives, as the Python package does with its files, so neither takes a growing one for a left one.
#pragma once

#include <string>
#include <vector>

namespace greedy::host {

class Part {
  public:
    // Follows symbolic links. StatusError where no file can be made.
    explicit Part(const std::string& name);
    ~Part();  // keeps the file where it is
    Part(const Part&) = delete;
    Part& operator=(const Part&) = delete;

    const std::string& path() const { return path_; }
    const std::string& target() const { return target_; }
    // Gives the file its final name; `older` if that replaces an older one. False, with errno, if it cannot.
    bool replace(bool& older);
    // Gives it a name that nothing has, the final one or <stem>.kept<suffix>; returns that name.
    std::string keep();
    void drop();

  private:
    void release();

    std::string target_, path_;
    int lock_ = -1;
};

// Temporary files for `name` that processes left which have ended.
std::vector<std::string> left_over(const std::string& name);

// Throws StatusError, got and expected, if no file `name` can be made.
void check_place(const std::string& name);

// A name on one line.
std::string shown(const std::string& name);

}  // namespace greedy::host
