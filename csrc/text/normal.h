// Single characters as ftfy replaces them, and Unicode's normal form C.
#pragma once

#include <string>

namespace greedy::core {

// ftfy's steps from fix_c1_controls to remove_control_chars: C1 controls, ligatures, widths, quotation marks, line
// breaks, terminal escapes, control characters.
std::u32string fix_characters(const std::u32string& text);

// unicodedata.normalize("NFC", text). Sorts combining marks, so n log n in a text of nothing else.
std::u32string normal_form_c(const std::u32string& text);

bool is_combining(char32_t code);  // of a combining class other than 0
bool is_invisible(char32_t code);  // white space, controls, formats, and letters that show nothing

}  // namespace greedy::core
