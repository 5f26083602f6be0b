// HTML entities, as Python's html.unescape and ftfy's unescape_html read them.
#pragma once

#include <string>

namespace greedy::core {

// html.unescape of valid UTF-8. Throws Error(GREEDY_INVALID) for a number of more digits than Python reads.
std::string unescape(const std::string& text);

// ftfy.fixes.unescape_html: only entities that end in a semicolon, and some in capitals.
std::u32string unescape_strictly(const std::u32string& text);
bool has_entity(const std::u32string& text);  // something that unescape_strictly may replace

}  // namespace greedy::core
