// From UTF-8 text to the token ids that a model reads: special tokens around it, within a limit.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "thread_pool.hpp"
#include "llama.h"

namespace llamacrab {

using token_vector = std::vector<llama_token>;

// llama.cpp's decomposition, on which BERT's uncased vocabularies rest, keeps only the first letter
// of a Hangul syllable. Syllables that come decomposed pass whole. The arithmetic is Unicode's
// (The Unicode Standard, 3.12 "Conjoining Jamo Behavior").
std::string decompose_hangul(std::string_view text);

// Split `text` and append its ids to `out`, without special tokens. Returns false where llama.cpp
// cannot: more tokens than it can count, or bytes for which the vocabulary has no token.
bool tokenize(const llama_vocab * vocab, std::string_view text, bool parse_special, bool decompose,
              token_vector & out);

enum class encode_status { ok, too_long, no_room, empty, unsplittable };

// Which part of a text that is too long is cut away.
enum class truncate_side { none, end, start, middle };

// Of `room` tokens that a text may keep, how many are its first; the others are its last.
int64_t first_kept(truncate_side side, int64_t room);

// How a text becomes ids: prefix, the tokens of lead + text + trail, suffix. Lead and trail are what
// touches a document in a reranker's template: they are split into tokens together with it, and are
// never cut. Of what lies between prefix and suffix, ids below `shift` are raised by it: there the
// vocabulary begins once more, for a second segment.
struct encoding {
    const llama_vocab * vocab = nullptr;
    token_vector        prefix;
    token_vector        suffix;
    std::string         lead;
    std::string         trail;
    int32_t             limit         = 0;
    int32_t             shift         = 0;
    truncate_side       truncate      = truncate_side::none;
    bool                parse_special = false;
    bool                decompose     = false;

    // Append the ids of `text` to `out`; on failure `out` is as before. `n_tokens` is the text's
    // length before any cut, special tokens counted.
    encode_status encode(std::string_view text, token_vector & out, int64_t & n_tokens) const;

    // Ids that nearly every text begins with: the prefix, and the tokens of `lead` but for the last,
    // which may come out otherwise where the text touches it.
    token_vector common() const;

  private:
    encode_status cut(std::string_view text, size_t content, token_vector & out) const;
};

// A text, or ids that are taken as they are: then `bytes` are those of the ids.
struct source {
    std::string_view bytes;
    bool             is_ids = false;
};

// What a run of texts has become: their ids one after another, and where those of each end. If a text
// could not be encoded, `status` says why, it is the one after the last in `ends`, and `n_tokens` is its
// length.
struct encoded {
    token_vector        tokens;
    std::vector<size_t> ends;
    encode_status       status   = encode_status::ok;
    int64_t             n_tokens = 0;
};

// Encode the first of `texts`, at least one and about as many as give `budget` tokens, with the help of
// `helpers`.
encoded encode_texts(const encoding & how, const std::vector<source> & texts, size_t budget, thread_pool & helpers);

}  // namespace llamacrab
