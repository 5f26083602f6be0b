// Errors are exceptions inside the core, and statuses at the C boundary.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>

#include "greedy/greedy.h"

namespace greedy::core {

// Text on one line, whatever a file or a library puts into it.
inline std::string one_line(const std::string& text) {
    std::string line;
    for (const unsigned char c : text) {
        char escaped[8];
        std::snprintf(escaped, sizeof escaped, "\\x%02x", c);
        line += c < 32 || c == 127 ? escaped : std::string(1, static_cast<char>(c));
    }
    return line;
}

class Error : public std::runtime_error {
  public:
    Error(int status, const std::string& text) : std::runtime_error(one_line(text)), status(status) {}
    const int status;  // a negative greedy_status
};

// "what: got X, expected Y"
[[noreturn]] inline void fail(int status, const std::string& what, const std::string& got,
                              const std::string& expected) {
    throw Error(status, what + ": got " + got + ", expected " + expected);
}

}  // namespace greedy::core
