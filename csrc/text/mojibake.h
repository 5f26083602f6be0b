// Text that was decoded with the wrong encoding, found and repaired as ftfy does.
#pragma once

#include <string>
#include <string_view>

namespace greedy::core {

// ftfy.badness.is_bad: some characters follow each other as only in garbled text. Linear.
bool is_garbled(std::u32string_view text);

// ftfy.fix_encoding. It repeats steps that are linear each, at most as often as the text has characters.
std::u32string fix_encoding(std::u32string text);

}  // namespace greedy::core
