// From UTF-8 text to the token ids that a model reads, with special tokens and within a limit.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "llama.h"
#include "thread_pool.hpp"
#include "tokens.hpp"

namespace llamacrab {

// Decompose Hangul syllables. BERT's uncased vocabularies need this: llama.cpp's own decomposition
// keeps only the first letter of a syllable, but leaves decomposed syllables as they are. The
// arithmetic is that of the Unicode Standard, 3.12 "Conjoining Jamo Behavior".
std::string decompose_hangul(std::string_view text);

// Split `text` and append its ids to `out`, without special tokens. Returns false if llama.cpp
// cannot split it: it has more tokens than can be counted, or bytes without a token.
bool tokenize(const llama_vocab * vocab, std::string_view text, bool parse_special, bool decompose,
              token_vector & out);

enum class tokenize_status { ok, too_long, no_room, empty, unsplittable };

// Which part to cut away from a text that is too long.
enum class truncate_side { none, end, start, middle };

// Number of leading tokens to keep out of `room`; the rest are trailing.
int64_t n_leading_kept(truncate_side side, int64_t room);

// How a text becomes ids: prefix_ids, the tokens of prefix_text + text + suffix_text, suffix_ids.
// In a reranker's template, the two strings touch the document, so they are split into tokens
// together with it. They are never cut. Between prefix_ids and suffix_ids, `shift` is added to all
// ids below it: from there on, the vocabulary is repeated for a second segment.
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

    // Append the ids of `text` to `out`. After a failure, `out` is unchanged. `n_tokens` is set to
    // the number of tokens before a cut, including special tokens.
    tokenize_status apply(std::string_view text, token_vector & out, int64_t & n_tokens) const;

    // Leading ids of nearly every text: prefix_ids, and the tokens of `prefix_text` except for the
    // last, which may be another one if the text touches it.
    token_vector common() const;

  private:
    tokenize_status cut(std::string_view text, size_t content, token_vector & out) const;
};

// A text, or ids that are used unchanged; then `bytes` are the bytes of the ids.
struct source {
    std::string_view bytes;
    bool is_ids = false;
};

// The ids of several texts, one after another, and where the ids of each text end. If a text could
// not be split, it is the one after the last in `ends`, `status` says why, and `n_tokens` is its
// length.
struct tokenized {
    token_vector tokens;
    std::vector<size_t> ends;
    tokenize_status status = tokenize_status::ok;
    int64_t n_tokens = 0;
};

// Split the first of `texts` into tokens, with the help of `helpers`: at least one text, and about
// as many as have `budget` tokens.
tokenized tokenize_texts(const tokenization & rules, const std::vector<source> & texts,
                         size_t budget, thread_pool & helpers);

}  // namespace llamacrab
