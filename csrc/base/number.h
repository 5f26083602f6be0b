// Fractions as text. printf, strtod and std::to_string follow the locale that a program around the core has set: they may
// want a comma where files and messages have a point.
#pragma once

#include <charconv>
#include <string>

namespace greedy::core {

// With so many digits behind the point, as printf's %f in the C locale.
inline std::string fixed(double value, int digits = 6) {
    char text[400];  // the largest double has 309 digits ahead of the point
    return {text, std::to_chars(text, text + sizeof text, value, std::chars_format::fixed, digits).ptr};
}

}  // namespace greedy::core
