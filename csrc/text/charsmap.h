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

    // Grapheme by grapheme, as the tokenizers library does it.
    std::string normalize(const std::string& text) const;

  private:
    // What the shortest known prefix of `text` becomes, or null.
    const char* find(std::string_view text) const;

    std::vector<std::uint32_t> trie_;  // a double array (Darts-clone)
    std::string values_;               // each ends with a zero
};

}  // namespace greedy::core
