// Runs the kinds of Hugging Face tokenizer.json that bundles hold: word lists, and SentencePiece unigrams as in (U)MT5.
//
// Normalisers: Lowercase, Precompiled, Strip, Replace (of a string, or of / {2,}/). Pre-tokenisers: Whitespace,
// WhitespaceSplit, Metaspace. Sequences of both. Models: WordLevel and Unigram. Special tokens in the text, and a
// TemplateProcessing of one text. The constructor refuses everything else, so that no text is tokenised wrongly.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "formats/json.h"

namespace greedy::core {

class Tokenizer {
  public:
    static constexpr std::int64_t kMaxRows = 512;  // rows that Wan2.1 was trained with

    // From the texts of tokenizer.json and tokenizer_config.json. Throws Error(GREEDY_BAD_BUNDLE).
    Tokenizer(std::string_view model, std::string_view config, const std::string& where);

    // Rows of every prompt: the tokenizer's own limit, at most kMaxRows.
    std::int64_t rows() const { return rows_; }

    // The largest id that encode() can return.
    std::int64_t largest_id() const;

    // Ids and mask of a cleaned prompt (UTF-8), each rows() long, as Tokenizer of engine/model/text.py. Cuts longer
    // prompts. Returns the number of tokens of the whole prompt. Throws Error(GREEDY_INVALID) if rules of the tokenizer
    // make it too long.
    std::size_t encode(const std::string& text, std::vector<std::int64_t>& ids, std::vector<std::int64_t>& mask) const;

    class Model {
      public:
        virtual ~Model() = default;
        virtual void encode(std::string_view piece, std::vector<std::int64_t>& ids) const = 0;
        virtual std::int64_t largest_id() const = 0;
    };

  private:
    struct Added {
        std::string text;
        std::int64_t id;
        bool left, right;  // removes the white space on that side
    };
    using Normalize = std::function<std::string(const std::string&)>;
    using Split = std::function<std::vector<std::string>(const std::string&)>;

    void read_added(const Json& list, const std::string& where);
    void read_template(const Json& processor, const std::string& where);
    void read_config(const Json& config, const std::string& where);
    void encode_plain(std::string_view text, std::vector<std::int64_t>& ids) const;

    std::vector<Added> added_;
    std::vector<Normalize> normalizers_;
    std::vector<Split> splits_;
    std::unique_ptr<Model> model_;
    std::vector<std::int64_t> before_, after_;  // special tokens around a prompt
    std::int64_t rows_ = kMaxRows, pad_ = 0;
};

}  // namespace greedy::core
