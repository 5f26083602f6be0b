// Prompts as Wan's pipeline reads them: ftfy.fix_text, html.unescape twice, white space folded. The same as clean_prompt
// of engine/model/text.py.
#pragma once

#include <string>

namespace greedy::core {

// Characters of a prompt. The model reads 512 tokens of at most 16 characters; as many again may be white space.
constexpr std::size_t kMostCharacters = 16'384;
// Characters of a prompt with HTML entities or garbled text: ftfy takes quadratic time for these.
constexpr std::size_t kMostGarbled = 2048;

// Throws Error(GREEDY_INVALID) for a prompt of more characters.
std::string clean_prompt(const std::string& prompt);

// Whether a cleaned prompt has no visible character.
bool is_blank(const std::string& prompt);

}  // namespace greedy::core
