// From UTF-8 text to the token ids that a model reads: special tokens around it, within a limit.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "llama.h"
#include "thread_pool.hpp"
#include "tokens.hpp"

namespace llamacrab {

// llama.cpp's decomposition, on which BERT's uncased vocabularies rest, keeps only the first letter
// of a Hangul syllable. Syllables that come decomposed pass whole. The arithmetic is Unicode's
// (The Unicode Standard, 3.12 "Conjoining Jamo Behavior").
std::string decompose_hangul(std::string_view text);

// Split `text` and append its ids to `out`, without special tokens. Returns false where llama.cpp
// cannot: more tokens than it can count, or bytes for which the vocabulary has no token.
bool tokenize(const llama_vocab * vocab, std::string_view text, bool parse_special, bool decompose,
              token_vector & out);

enum class tokenize_status { ok, too_long, no_room, empty, unsplittable };

// Which part of a text that is too long is cut away.
enum class truncate_side { none, end, start, middle };

// Of `room` tokens that a text may keep, how many are its first; the others are its last.
int64_t first_kept(truncate_side side, int64_t room);

// How a text becomes ids: prefix_ids, the tokens of prefix_text + text + suffix_text, suffix_ids.
// The two texts touch a document in a reranker's template: they are split into tokens together with
// it, and are never cut. Between prefix_ids and suffix_ids, ids below `shift` are raised by it: a
// second copy of the vocabulary begins there, for a second segment.
struct tokenization {
    const llama_vocab * vocab = nullptr;
    token_vector prefix_ids;
    token_vector suffix_ids;
    std::string prefix_text;
    std::string suffix_text;
    int32_t limit = 0;
    int32_t shift = 0;
    truncate_side truncate = truncate_side::none;
    bool parse_special = false;
    bool decompose = false;

    // Append the ids of `text` to `out`; on failure `out` is as before. `n_tokens` is the text's
    // length before any cut, special tokens counted.
    tokenize_status apply(std::string_view text, token_vector & out, int64_t & n_tokens) const;

    // Ids that nearly every text begins with: prefix_ids, and the tokens of `prefix_text` but for
    // the last, which may come out otherwise where the text touches it.
    token_vector common() const;

  private:
    tokenize_status cut(std::string_view text, size_t content, token_vector & out) const;
};

// A text, or ids that are taken as they are: then `bytes` are those of the ids.
struct source {
    std::string_view bytes;
    bool is_ids = false;
};

// What a run of texts has become: their ids one after another, and where those of each end. If a
// text could not be split, `status` says why, it is the one after the last in `ends`, and
// `n_tokens` is its length.
struct tokenized {
    token_vector tokens;
    std::vector<size_t> ends;
    tokenize_status status = tokenize_status::ok;
    int64_t n_tokens = 0;
};

// Tokenize the first of `texts`, at least one and about as many as give `budget` tokens, with the
// help of `helpers`.
tokenized tokenize_texts(const tokenization & rules, const std::vector<source> & texts,
                         size_t budget, thread_pool & helpers);

}  // namespace llamacrab
