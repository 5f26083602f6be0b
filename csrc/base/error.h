// Errors are exceptions inside the core, and statuses at the C boundary.
#pragma once

#include <stdexcept>
#include <string>

#include "greedy/greedy.h"

namespace greedy::core {

class Error : public std::runtime_error {
  public:
    Error(int status, const std::string& text) : std::runtime_error(text), status(status) {}
    const int status;  // a negative greedy_status
};

// "what: got X, expected Y"
[[noreturn]] inline void fail(int status, const std::string& what, const std::string& got,
                              const std::string& expected) {
    throw Error(status, what + ": got " + got + ", expected " + expected);
}

}  // namespace greedy::core
