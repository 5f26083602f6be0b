// Where bytes go: a file under a temporary name, or standard output.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "host/part.h"

namespace greedy::host {

// Puts /dev/null in the place of standard streams that are closed: a file that is opened later must not get such a
// number, or messages would land in it. Call it first.
void hold_standard_streams();
// Whether the program began with this standard stream.
bool was_open(int number);
// Throws StatusError if standard output cannot be written. `what` begins the message, `target` is what was asked for.
void check_stdout(const std::string& what, const std::string& target);

// A temporary file, with a note on what killed processes left for the same name.
std::unique_ptr<Part> reserve(const std::string& name, std::vector<std::string>& notes);
// Gives a whole output its final name, with a note if that replaces an older one. `asked` is the name in an error.
void publish(Part& part, const std::string& asked, std::vector<std::string>& notes);

// Throws StatusError: the system's reason, for the output that the user asked for.
[[noreturn]] void output_failure(const std::string& asked);

class Output {
  public:
    // asked: a file's name, or - for standard output. Throws OutputClosed if the reader of its pipe has gone.
    Output(const std::string& asked, std::vector<std::string>& notes);
    ~Output();
    Output(const Output&) = delete;
    Output& operator=(const Output&) = delete;

    void write(const void* data, std::size_t size);
    // All that was written so far is worth keeping.
    void mark() { whole_ = sent_; }
    void keep();
    // Keeps what was there at the last mark, under a name that nothing has; empty if that is nothing.
    std::string rescue();

  private:
    std::vector<std::string>& notes_;
    const std::string asked_;
    std::unique_ptr<Part> part_;
    int file_ = -1;
    off_t sent_ = 0, whole_ = 0;
};

}  // namespace greedy::host
