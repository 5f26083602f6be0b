#include "text/tokenizer.h"

#include <algorithm>
#include <limits>
#include <unordered_map>

#include "base/error.h"
#include "base/utf8.h"
#include "text/charsmap.h"
#include "text/text.h"

namespace greedy::core {
namespace {

constexpr std::int64_t kMaxId = std::numeric_limits<std::int32_t>::max();

// What bounds the cost of a prompt. (U)MT5 has 1 step, pieces of 48 bytes and 300 added tokens.
constexpr std::size_t kMostSteps = 16;     // of normalisers, and of pre-tokenisers
constexpr std::size_t kMostAdded = 1024;   // added tokens
constexpr std::size_t kMostPiece = 256;    // bytes of a piece, or of an added token
constexpr std::size_t kMostReplaced = 64;  // bytes that a character or a string becomes
constexpr std::size_t kMostNormal = std::size_t{1} << 19;  // bytes of a normalised prompt

[[noreturn]] void refuse(const std::string& where, const std::string& got) {
    fail(GREEDY_BAD_BUNDLE, where, got, "a kind of tokenizer that this library reads (see csrc/text/tokenizer.h)");
}

// The steps in a normaliser or pre-tokeniser. A Sequence stands for its members, null for no step.
std::vector<const Json*> steps_of(const Json* listed, const char* members, const std::string& where) {
    if (!listed || listed->is_null()) return {};
    if (listed->at("type", where).string(where) != "Sequence") return {listed};
    std::vector<const Json*> out;
    for (const Json& step : listed->at(members, where).array(where))
        for (const Json* inner : steps_of(&step, members, where)) out.push_back(inner);
    if (out.size() > kMostSteps) refuse(where, std::to_string(out.size()) + " " + members);
    return out;
}

std::string replace_all(const std::string& text, const std::string& from, const std::string& to) {
    std::string out;
    std::size_t at = 0;
    for (std::size_t found; (found = text.find(from, at)) != std::string::npos; at = found + from.size())
        out.append(text, at, found - at).append(to);
    return out.append(text, at);
}

std::string replace_spaces(const std::string& text, const std::string& to) {  // / {2,}/
    std::string out;
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t end = std::min(text.find_first_not_of(' ', at), text.size());
        if (end - at >= 2)
            out += to;
        else if (end > at)
            out += ' ';
        else
            out += text[at];
        at = std::max(end, at + 1);
    }
    return out;
}

std::string strip(const std::string& text, bool left, bool right) {
    const std::vector<Character> all = characters(text);
    std::size_t first = 0, last = all.size();
    while (left && first < last && is_space(all[first].code)) ++first;
    while (right && first < last && is_space(all[last - 1].code)) --last;
    std::string out;
    for (std::size_t i = first; i < last; ++i) out += all[i].bytes;
    return out;
}

// Runs of word characters and runs of other characters without white space, /\w+|[^\w\s]+/; or splits at white space.
std::vector<std::string> split_words(const std::string& text, bool at_marks) {
    std::vector<std::string> out;
    int last = -1;  // class of the current run; -1 is none
    for (const Character& c : characters(text)) {
        const int kind = is_space(c.code) && !(at_marks && is_word(c.code)) ? -1 : at_marks ? is_word(c.code) : 0;
        if (kind >= 0 && kind != last) out.emplace_back();
        if (kind >= 0) out.back() += c.bytes;
        last = kind;
    }
    return out;
}

struct Metaspace {
    std::string mark;
    bool prepend, split;

    std::vector<std::string> operator()(const std::string& text) const {
        std::string marked = replace_all(text, " ", mark);
        if (prepend && !marked.empty() && marked.compare(0, mark.size(), mark) != 0) marked = mark + marked;
        if (!split) return {marked};
        std::vector<std::string> out;
        for (std::size_t at = 0; at < marked.size();) {  // a piece begins at every mark
            const std::size_t end = std::min(
                marked.find(mark, at + (marked.compare(at, mark.size(), mark) == 0 ? mark.size() : 0)), marked.size());
            out.push_back(marked.substr(at, end - at));
            at = end;
        }
        return out;
    }
};

class WordLevel : public Tokenizer::Model {
  public:
    WordLevel(const Json& model, const std::string& where) {
        for (const auto& [word, id] : model.at("vocab", where).object(where)) ids_[word] = id.integer(where, 0, kMaxId);
        const auto unknown = ids_.find(model.at("unk_token", where).string(where));
        if (unknown == ids_.end()) fail(GREEDY_BAD_BUNDLE, where, "an unk_token outside the vocabulary", "one inside");
        unknown_ = unknown->second;
    }

    void encode(std::string_view piece, std::vector<std::int64_t>& ids) const override {
        const auto found = ids_.find(std::string(piece));
        ids.push_back(found == ids_.end() ? unknown_ : found->second);
    }

    std::int64_t largest_id() const override {
        std::int64_t largest = 0;
        for (const auto& entry : ids_) largest = std::max(largest, entry.second);
        return largest;
    }

  private:
    std::unordered_map<std::string, std::int64_t> ids_;
    std::int64_t unknown_;
};

// The most probable split into pieces of a SentencePiece model (Kudo, 2018).
class Unigram : public Tokenizer::Model {
  public:
    Unigram(const Json& model, const std::string& where) {
        if (const Json* fallback = model.find("byte_fallback"); fallback && fallback->boolean(where))
            refuse(where, "byte_fallback");
        const Json::Array& vocab = model.at("vocab", where).array(where);
        unknown_ = model.at("unk_id", where).integer(where, 0, static_cast<std::int64_t>(vocab.size()) - 1);
        double least = std::numeric_limits<double>::infinity();
        pieces_.reserve(vocab.size());
        for (const Json& entry : vocab) {
            const Json::Array& pair = entry.array(where);
            if (pair.size() != 2) fail(GREEDY_BAD_BUNDLE, where, "no pair in the vocabulary", "a piece and its score");
            const std::string& piece = pair[0].string(where);
            const double score = pair[1].number(where);
            if (piece.size() > kMostPiece) refuse(where, "a piece of " + std::to_string(piece.size()) + " bytes");
            pieces_[piece] = {static_cast<std::int64_t>(scores_.size()), score};
            scores_.push_back(score);
            longest_ = std::max(longest_, piece.size());
            least = std::min(least, score);
        }
        unknown_score_ = least - 10.0;
    }

    void encode(std::string_view text, std::vector<std::int64_t>& ids) const override {
        struct Node {
            double score = 0;
            std::size_t start = 0;
            std::int64_t id = 0;
            bool reached = false;
        };
        std::vector<Node> nodes(text.size() + 1);
        const auto offer = [&](std::size_t start, std::size_t end, std::int64_t id, double score) {
            score += nodes[start].score;
            if (!nodes[end].reached || score > nodes[end].score) nodes[end] = {score, start, id, true};
        };
        for (std::size_t start = 0, width; start < text.size(); start += width) {
            width = std::max<std::size_t>(utf8_length(text.substr(start)), 1);
            bool single = false;
            for (std::size_t end = start + width; end <= text.size() && end - start <= longest_;
                 end += std::max<std::size_t>(utf8_length(text.substr(end)), 1)) {
                const auto found = pieces_.find(std::string(text.substr(start, end - start)));
                if (found == pieces_.end()) continue;
                offer(start, end, found->second.id, found->second.score);
                single |= end == start + width;
            }
            if (!single) offer(start, start + width, unknown_, unknown_score_);
        }
        // Backwards; consecutive unknown characters are one token.
        std::vector<std::int64_t> reversed;
        std::size_t unknown_end = 0;
        for (std::size_t end = text.size(); end > 0; end = nodes[end].start) {
            const bool unknown = nodes[end].id == unknown_;
            if (unknown && unknown_end) {
                reversed.back() = id_of(text.substr(nodes[end].start, unknown_end - nodes[end].start));
                continue;
            }
            unknown_end = unknown ? end : 0;
            reversed.push_back(id_of(text.substr(nodes[end].start, end - nodes[end].start)));
        }
        ids.insert(ids.end(), reversed.rbegin(), reversed.rend());
    }

    std::int64_t largest_id() const override { return static_cast<std::int64_t>(scores_.size()) - 1; }

  private:
    struct Piece {
        std::int64_t id;
        double score;
    };
    std::int64_t id_of(std::string_view piece) const {
        if (piece.size() > longest_) return unknown_;
        const auto found = pieces_.find(std::string(piece));
        return found == pieces_.end() ? unknown_ : found->second.id;
    }

    std::unordered_map<std::string, Piece> pieces_;
    std::vector<double> scores_;
    std::size_t longest_ = 0;
    std::int64_t unknown_;
    double unknown_score_;
};

bool flag(const Json& token, const char* key, const std::string& where) {
    const Json* found = token.find(key);
    return found && found->boolean(where);
}

}  // namespace

Tokenizer::Tokenizer(std::string_view text, std::string_view config, const std::string& where) {
    const std::string at = where + "/tokenizer.json";
    if (text.size() > Json::kMostBytes)
        fail(GREEDY_BAD_BUNDLE, at, std::to_string(text.size()) + " bytes", "at most " + std::to_string(Json::kMostBytes));
    const Json json = Json::parse(text, at, Json::kMostInLists);
    for (const Json* step : steps_of(json.find("normalizer"), "normalizers", at)) {
        const std::string& type = step->at("type", at).string(at);
        if (type == "Lowercase") {
            normalizers_.push_back([](const std::string& s) { return lower_case(s); });
        } else if (type == "Precompiled") {
            const auto map = std::make_shared<Charsmap>(step->at("precompiled_charsmap", at).string(at), at);
            normalizers_.push_back([map](const std::string& s) { return map->normalize(s); });
        } else if (type == "Strip") {
            const bool left = flag(*step, "strip_left", at), right = flag(*step, "strip_right", at);
            normalizers_.push_back([=](const std::string& s) { return strip(s, left, right); });
        } else if (type == "Replace") {
            const Json& pattern = step->at("pattern", at);
            const std::string to = step->at("content", at).string(at);
            if (to.size() > kMostReplaced) refuse(at, "content of " + std::to_string(to.size()) + " bytes");
            const Json* from = pattern.find("String");
            if (from && !from->string(at).empty())
                normalizers_.push_back(
                    [=, what = from->string(at)](const std::string& s) { return replace_all(s, what, to); });
            else if (pattern.find("Regex") && pattern.find("Regex")->string(at) == " {2,}")
                normalizers_.push_back([=](const std::string& s) { return replace_spaces(s, to); });
            else
                refuse(at, "another pattern to replace");
        } else {
            refuse(at, "normalizer " + type.substr(0, 60));
        }
    }
    for (const Json* step : steps_of(json.find("pre_tokenizer"), "pretokenizers", at)) {
        const std::string& type = step->at("type", at).string(at);
        if (type == "Whitespace" || type == "WhitespaceSplit") {
            const bool marks = type == "Whitespace";
            splits_.push_back([=](const std::string& s) { return split_words(s, marks); });
        } else if (type == "Metaspace") {
            const Json* scheme = step->find("prepend_scheme");
            const std::string prepend = scheme ? scheme->string(at) : "always";
            if (prepend != "always" && prepend != "never") refuse(at, "prepend_scheme " + prepend.substr(0, 60));
            const Json* split = step->find("split");
            const std::string& mark = step->at("replacement", at).string(at);
            if (mark.empty() || mark.size() > kMostReplaced)
                refuse(at, "a replacement of " + std::to_string(mark.size()) + " bytes");
            splits_.push_back(Metaspace{mark, prepend == "always", !split || split->boolean(at)});
        } else {
            refuse(at, "pre_tokenizer " + type.substr(0, 60));
        }
    }
    const Json& model = json.at("model", at);
    const std::string& type = model.at("type", at).string(at);
    if (type == "WordLevel")
        model_ = std::make_unique<WordLevel>(model, at);
    else if (type == "Unigram")
        model_ = std::make_unique<Unigram>(model, at);
    else
        refuse(at, "model " + type.substr(0, 60));
    if (const Json* added = json.find("added_tokens")) read_added(*added, at);
    if (const Json* processor = json.find("post_processor"); processor && !processor->is_null())
        read_template(*processor, at);
    read_config(Json::parse(config, where + "/tokenizer_config.json"), where + "/tokenizer_config.json");
}

void Tokenizer::read_added(const Json& list, const std::string& where) {
    for (const Json& token : list.array(where)) {
        const std::string& text = token.at("content", where).string(where);
        if (text.empty() || flag(token, "normalized", where) || flag(token, "single_word", where))
            refuse(where, "added token '" + text.substr(0, 60) + "' that is normalized or a single word");
        if (text.size() > kMostPiece || added_.size() == kMostAdded)
            refuse(where, "more than " + std::to_string(kMostAdded) + " added tokens, or one of more than " +
                              std::to_string(kMostPiece) + " bytes");
        added_.push_back({text, token.at("id", where).integer(where, 0, kMaxId), flag(token, "lstrip", where),
                          flag(token, "rstrip", where)});
    }
    // The longest token that fits wins.
    std::stable_sort(added_.begin(), added_.end(),
                     [](const Added& a, const Added& b) { return a.text.size() > b.text.size(); });
}

void Tokenizer::read_template(const Json& processor, const std::string& where) {
    if (processor.at("type", where).string(where) != "TemplateProcessing") refuse(where, "another post_processor");
    bool seen = false;
    for (const Json& part : processor.at("single", where).array(where)) {
        const Json* special = part.find("SpecialToken");
        if (!special) {
            if (seen || !part.find("Sequence")) refuse(where, "a template that is not one text");
            seen = true;
            continue;
        }
        const std::string& name = special->at("id", where).string(where);
        const Json& token = processor.at("special_tokens", where).at(name, where);
        for (const Json& id : token.at("ids", where).array(where))
            (seen ? after_ : before_).push_back(id.integer(where, 0, kMaxId));
        if (before_.size() + after_.size() > static_cast<std::size_t>(kMaxRows)) refuse(where, "a longer template");
    }
    if (!seen) refuse(where, "a template without a text");
}

void Tokenizer::read_config(const Json& config, const std::string& where) {
    for (const char* side : {"padding_side", "truncation_side"})
        if (const Json* found = config.find(side); found && found->string(where) != "right")
            refuse(where, std::string(side) + " " + found->string(where).substr(0, 60));
    // A tokenizer without a limit reports an astronomical one.
    if (const Json* limit = config.find("model_max_length"); limit && !limit->is_null())
        rows_ = static_cast<std::int64_t>(std::min(limit->number(where), static_cast<double>(kMaxRows)));
    if (rows_ < static_cast<std::int64_t>(before_.size() + after_.size()) + 1)
        fail(GREEDY_BAD_BUNDLE, where, "model_max_length " + std::to_string(rows_), "room for a prompt");
    const Json& pad = config.at("pad_token", where);
    const std::string& text = pad.is_object() ? pad.at("content", where).string(where) : pad.string(where);
    const auto found = std::find_if(added_.begin(), added_.end(), [&](const Added& a) { return a.text == text; });
    if (found == added_.end())
        fail(GREEDY_BAD_BUNDLE, where, "pad_token '" + text.substr(0, 60) + "'", "an added token");
    pad_ = found->id;
}

std::int64_t Tokenizer::largest_id() const {
    std::int64_t largest = std::max(model_->largest_id(), pad_);
    for (const Added& token : added_) largest = std::max(largest, token.id);
    for (const auto* special : {&before_, &after_})
        for (std::int64_t id : *special) largest = std::max(largest, id);
    return largest;
}

void Tokenizer::encode_plain(std::string_view text, std::vector<std::int64_t>& ids) const {
    std::string normal(text);
    for (const Normalize& normalize : normalizers_) {
        normal = normalize(normal);
        if (normal.size() > kMostNormal)
            fail(GREEDY_INVALID, "prompt", std::to_string(normal.size()) + " bytes when normalised",
                 "at most " + std::to_string(kMostNormal));
    }
    std::vector<std::string> pieces = {normal};
    for (const Split& split : splits_) {
        std::vector<std::string> next;
        for (const std::string& piece : pieces) {
            std::vector<std::string> parts = split(piece);
            std::move(parts.begin(), parts.end(), std::back_inserter(next));
        }
        pieces = std::move(next);
    }
    for (const std::string& piece : pieces)
        if (!piece.empty()) model_->encode(piece, ids);
}

std::size_t Tokenizer::encode(const std::string& text, std::vector<std::int64_t>& ids,
                              std::vector<std::int64_t>& mask) const {
    ids.clear();
    std::size_t plain = 0;  // start of the text after the last special token
    for (std::size_t at = 0; at < text.size();) {
        const auto fits = [&](const Added& token) { return text.compare(at, token.text.size(), token.text) == 0; };
        const auto found = std::find_if(added_.begin(), added_.end(), fits);
        if (found == added_.end()) {
            ++at;
            continue;
        }
        std::string_view before = std::string_view(text).substr(plain, at - plain);
        std::string stripped = found->left ? strip(std::string(before), false, true) : std::string(before);
        if (!stripped.empty()) encode_plain(stripped, ids);
        ids.push_back(found->id);
        at += found->text.size();
        if (found->right)
            for (std::size_t length; at < text.size(); at += length) {
                const std::string_view rest = std::string_view(text).substr(at);
                length = std::max<std::size_t>(utf8_length(rest), 1);
                if (!is_space(utf8_code(rest, length))) break;
            }
        plain = at;
    }
    if (plain < text.size()) encode_plain(std::string_view(text).substr(plain), ids);
    const std::size_t rows = static_cast<std::size_t>(rows_), room = rows - before_.size() - after_.size();
    const std::size_t whole = ids.size() + before_.size() + after_.size();
    if (ids.size() > room) ids.resize(room);
    ids.insert(ids.begin(), before_.begin(), before_.end());
    ids.insert(ids.end(), after_.begin(), after_.end());
    mask.assign(ids.size(), 1);
    ids.resize(rows, pad_);
    mask.resize(rows, 0);
    return whole;
}

}  // namespace greedy::core
