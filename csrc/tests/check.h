// A check for the test programs: it counts failures and does not stop.
#pragma once

#include <cstdio>
#include <string>

inline int failures = 0;

inline void check(bool good, const std::string& what) {
    if (good) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}
