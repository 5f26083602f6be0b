// SentencePiece's compiled normalisation rules (Precompiled in a tokenizer.json).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace greedy::core {

class Charsmap {
  public:
    // From base64. Throws Error(GREEDY_BAD_BUNDLE).
    Charsmap(const std::string& base64, const std::string& where);

    // Works grapheme by grapheme, as the tokenizers library does.
    std::string normalize(const std::string& text) const;

  private:
    // The replacement of the shortest known prefix of `text`, or null.
    const char* find(std::string_view text) const;

    std::vector<std::uint32_t> trie_;  // a double array (Darts-clone)
    std::string values_;               // each ends with a zero
};

}  // namespace greedy::core
