#include "tokenization.hpp"

#include <algorithm>
#include <atomic>
#include <climits>
#include <exception>
#include <new>

namespace llamacrab {

namespace {

// Append a character of three bytes, such as every jamo (U+1100 to U+11FF).
void append_utf8(std::string & out, uint32_t code) {
    out += char(0xE0 | (code >> 12));
    out += char(0x80 | ((code >> 6) & 0x3F));
    out += char(0x80 | (code & 0x3F));
}

}  // namespace

std::string decompose_hangul(std::string_view text) {
    constexpr uint32_t first = 0xAC00, last = 0xD7A3, n_vowels = 21, n_finals = 28;
    std::string out;
    out.reserve(text.size() + text.size() / 2);
    for (size_t i = 0; i < text.size();) {
        const auto byte = [&](size_t k) { return uint32_t(uint8_t(text[i + k])); };
        // A syllable has three bytes; the first is from EA to ED.
        const bool three = byte(0) >= 0xEA && byte(0) <= 0xED && i + 2 < text.size();
        const auto code =
            three ? (byte(0) & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F) : 0;
        if (code < first || code > last) {
            out += text[i++];
            continue;
        }
        const uint32_t s = code - first;
        append_utf8(out, 0x1100 + s / (n_vowels * n_finals));
        append_utf8(out, 0x1161 + s % (n_vowels * n_finals) / n_finals);
        if (s % n_finals) {
            append_utf8(out, 0x11A7 + s % n_finals);
        }
        i += 3;
    }
    return out;
}

namespace {

// One character of valid UTF-8.
struct character {
    uint32_t code;
    size_t size;
};

character character_at(std::string_view text, size_t at) {
    const uint8_t first = uint8_t(text[at]);
    const size_t size = first < 0xC0 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    uint32_t code = size == 1 ? first : first & (0x7F >> size);
    for (size_t k = 1; k < size && at + k < text.size(); ++k) {
        code = code << 6 | (uint8_t(text[at + k]) & 0x3F);
    }
    return {code, size};
}

bool is_space(uint32_t code) {
    return code == ' ' || (code >= '\t' && code <= '\r') || code == 0x85 || code == 0xA0 ||
           code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 ||
           code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

// Punctuation of ASCII, except for the apostrophe, and of Chinese and Japanese.
bool is_mark(uint32_t code) {
    const bool ascii = (code > ' ' && code < '0') || (code > '9' && code < 'A') ||
                       (code > 'Z' && code < 'a') || (code > 'z' && code < 0x7F);
    return (ascii && code != '\'') || (code >= 0x3001 && code <= 0x3011) ||
           (code >= 0xFF01 && code <= 0xFF0F) || (code >= 0xFF1A && code <= 0xFF20);
}

// Split `text` with llama.cpp and append its ids.
bool split(const llama_vocab * vocab, std::string_view text, bool parse_special,
           token_vector & out) {
    const size_t before = out.size();
    // One token per byte is enough, unless normalization makes the text longer.
    int32_t room = int32_t(text.size()) + 8;
    for (int tries = 0; tries < 2; ++tries) {
        out.resize(before + room);
        const int32_t n =
            llama_tokenize(vocab, text.data(), int32_t(text.size()), out.data() + before, room,
                           /*add_special=*/false, parse_special);
        if (n >= 0) {
            out.resize(before + n);
            return true;
        }
        if (n == INT32_MIN) {
            break;
        }
        room = -n;
    }
    return false;
}

// Most BPE vocabularies split with std::regex, which recurses once per character: 25,000 letters,
// spaces or signs in a row overflow a stack of 8 MiB and end the process. So a run of text without
// a change between whitespace and other characters is cut into pieces of at most 4,096 characters:
// before punctuation, where these vocabularies split anyway, or otherwise anywhere.
bool split_bpe(const llama_vocab * vocab, std::string_view text, bool parse_special,
               token_vector & out) {
    constexpr int max_characters = 4096;
    size_t start = 0;      // of the piece
    size_t good_cut = 0;   // last good place for a cut in the piece; 0: none
    int n_characters = 0;  // of the run, in this piece
    uint32_t previous = ' ';
    for (size_t i = 0; i < text.size();) {
        const auto [code, size] = character_at(text, i);
        if (is_space(code) != is_space(previous)) {
            n_characters = 0;
            good_cut = 0;
        } else if (n_characters > max_characters / 2 && is_mark(code) && !is_mark(previous)) {
            good_cut = i;
        }
        if (n_characters == max_characters) {
            const size_t cut = good_cut ? good_cut : i;
            if (!split(vocab, text.substr(start, cut - start), parse_special, out)) {
                return false;
            }
            start = i = cut;
            good_cut = 0;
            n_characters = 0;
            previous = code;
            continue;
        }
        previous = code;
        n_characters += 1;
        i += size;
    }
    return split(vocab, text.substr(start), parse_special, out);
}

// Which characters occur in a token that is not a single byte.
std::vector<bool> characters_of(const llama_vocab * vocab) {
    std::vector<bool> known(0x110000);
    known[' '] = true;
    for (llama_token token = 0; token < llama_vocab_n_tokens(vocab); ++token) {
        if (!(llama_vocab_get_attr(vocab, token) & LLAMA_TOKEN_ATTR_BYTE)) {
            const std::string_view spelled = llama_vocab_get_text(vocab, token);
            for (size_t i = 0; i < spelled.size();) {
                const auto [code, size] = character_at(spelled, i);
                known[std::min<size_t>(code, 0x10FFFF)] = true;
                i += size;
            }
        }
    }
    return known;
}

// For every character that an SPM vocabulary spells in bytes, llama.cpp copies all tokens so far:
// 10 MB of line breaks took half an hour. So a long text is cut before characters that are in no
// token. No token can contain such a place, so the ids are the same.
bool split_spm(const llama_vocab * vocab, std::string_view text, token_vector & out) {
    constexpr size_t min_bytes = 4096;
    const std::vector<bool> known = characters_of(vocab);
    token_vector piece;
    size_t n_extra = 0;
    for (size_t start = 0; start < text.size();) {
        size_t stop = start + character_at(text, start).size, size = 0;
        while (stop < text.size()) {
            const auto [code, bytes] = character_at(text, stop);
            if (stop - start >= min_bytes && !known[code]) {
                size = bytes;
                break;
            }
            stop += bytes;
        }
        piece.clear();
        if (!split(vocab, text.substr(start, stop - start), false, piece)) {
            return false;
        }
        out.insert(out.end(), piece.begin() + ptrdiff_t(n_extra), piece.end());
        if (size) {
            // llama.cpp puts a space before each piece, as before a text: remove its tokens.
            piece.clear();
            split(vocab, text.substr(stop, size), false, piece);
            n_extra = piece.size() - size;
        }
        start = stop;
    }
    return true;
}

}  // namespace

bool tokenize(const llama_vocab * vocab, std::string_view text, bool parse_special, bool decompose,
              token_vector & out) {
    std::string decomposed;
    if (decompose) {
        for (const char c : text) {
            if (uint8_t(c) >= 0xEA && uint8_t(c) <= 0xED) {
                decomposed = decompose_hangul(text);
                text = decomposed;
                break;
            }
        }
    }
    const size_t before = out.size();
    bool ok = false;
    try {
        const auto type = llama_vocab_type(vocab);
        if (type == LLAMA_VOCAB_TYPE_BPE) {
            ok = split_bpe(vocab, text, parse_special, out);
        } else if (type == LLAMA_VOCAB_TYPE_SPM && text.size() > 65536 && !parse_special) {
            ok = split_spm(vocab, text, out);
        } else {
            ok = split(vocab, text, parse_special, out);
        }
    } catch (const std::bad_alloc &) {
        throw;
    } catch (const std::exception &) {
        // A vocabulary that lacks the tokens of single bytes, for example.
    }
    if (!ok) {
        out.resize(before);
    }
    return ok;
}

int64_t n_leading_kept(truncate_side side, int64_t room) {
    return side == truncate_side::start    ? 0
           : side == truncate_side::middle ? room - room / 2
                                           : room;
}

tokenize_status tokenization::apply(std::string_view text, token_vector & out,
                                    int64_t & n_tokens) const {
    const size_t before = out.size();
    out.insert(out.end(), prefix_ids.begin(), prefix_ids.end());
    const size_t content = out.size();
    const bool bare = prefix_text.empty() && suffix_text.empty();
    auto status = tokenize_status::ok;
    if (!tokenize(vocab, bare ? text : prefix_text + std::string(text) + suffix_text, parse_special,
                  decompose, out)) {
        status = tokenize_status::unsplittable;
    } else if (n_tokens = int64_t(out.size() - before + suffix_ids.size()); n_tokens == 0) {
        status = tokenize_status::empty;
    } else if (n_tokens > limit) {
        status =
            truncate == truncate_side::none ? tokenize_status::too_long : cut(text, content, out);
    }
    if (status != tokenize_status::ok) {
        out.resize(before);
        return status;
    }
    for (size_t i = content; i < out.size(); ++i) {
        out[i] += out[i] < shift ? shift : 0;
    }
    out.insert(out.end(), suffix_ids.begin(), suffix_ids.end());
    return status;
}

// Shorten the ids in `out` from `content` on, those of prefix_text + text + suffix_text, so that
// they and suffix_ids fit.
tokenize_status tokenization::cut(std::string_view text, size_t content, token_vector & out) const {
    const auto split = [&](std::string_view piece, token_vector & into) {
        return tokenize(vocab, piece, parse_special, decompose, into);
    };
    token_vector opening, closing;
    if (!split(prefix_text, opening) || !split(suffix_text, closing)) {
        return tokenize_status::unsplittable;
    }
    const auto n_before = int64_t(opening.size()), n_after = int64_t(closing.size());
    const auto room =
        int64_t(limit) - int64_t(prefix_ids.size() + suffix_ids.size()) - n_before - n_after;
    if (room <= 0) {
        return tokenize_status::no_room;
    }
    const int64_t n_first = n_leading_kept(truncate, room), n_last = room - n_first;
    if (prefix_text.empty() && suffix_text.empty()) {
        out.erase(out.begin() + ptrdiff_t(content + n_first), out.end() - ptrdiff_t(n_last));
        return tokenize_status::ok;
    }
    // What is kept of the text touches prefix_text or suffix_text as in the whole.
    if (n_first) {
        opening.clear();
        split(prefix_text + std::string(text), opening);
        opening.resize(size_t(std::min(n_before + n_first, int64_t(opening.size()))));
    }
    if (n_last) {
        closing.clear();
        split(std::string(text) + suffix_text, closing);
        closing.erase(closing.begin(),
                      closing.end() - std::min(n_after + n_last, int64_t(closing.size())));
    }
    out.resize(content);
    out.insert(out.end(), opening.begin(), opening.end());
    out.insert(out.end(), closing.begin(), closing.end());
    return tokenize_status::ok;
}

token_vector tokenization::common() const {
    token_vector out = prefix_ids;
    if (!prefix_text.empty() && tokenize(vocab, prefix_text, parse_special, decompose, out) &&
        out.size() > prefix_ids.size()) {
        out.pop_back();
    }
    return out;
}

namespace {

tokenized tokenize_run(const tokenization & rules, const source * texts, size_t n) {
    tokenized out;
    for (size_t i = 0; i < n && out.status == tokenize_status::ok; ++i) {
        if (texts[i].is_ids) {
            const auto * ids = reinterpret_cast<const llama_token *>(texts[i].bytes.data());
            out.tokens.insert(out.tokens.end(), ids,
                              ids + texts[i].bytes.size() / sizeof(llama_token));
        } else {
            out.status = rules.apply(texts[i].bytes, out.tokens, out.n_tokens);
        }
        if (out.status == tokenize_status::ok) {
            out.ends.push_back(out.tokens.size());
        }
    }
    return out;
}

}  // namespace

tokenized tokenize_texts(const tokenization & rules, const std::vector<source> & texts,
                         size_t budget, thread_pool & helpers) {
    // Parts large enough for another thread: waking it takes as long as a few hundred bytes.
    constexpr size_t part_bytes = 4096;
    std::vector<size_t> starts;
    for (size_t i = 0, bytes = part_bytes; i < texts.size(); ++i) {
        if (bytes >= part_bytes) {
            starts.push_back(i);
            bytes = 0;
        }
        bytes += texts[i].bytes.size();
    }
    const size_t n_parts = starts.size();
    starts.push_back(texts.size());

    // Parts are taken in order. So the parts that are done when the budget is used up, or when a
    // text has failed, are the first ones.
    std::vector<tokenized> parts(n_parts);
    std::vector<std::exception_ptr> thrown(n_parts);
    std::atomic<size_t> next{0}, n_tokens{0};
    const auto work = [&](int) {
        while (n_tokens < budget) {
            const size_t k = next++;
            if (k >= n_parts) {
                return;
            }
            try {
                parts[k] = tokenize_run(rules, texts.data() + starts[k], starts[k + 1] - starts[k]);
            } catch (...) {
                thrown[k] = std::current_exception();
            }
            n_tokens += thrown[k] || parts[k].status != tokenize_status::ok
                            ? budget
                            : parts[k].tokens.size();
        }
    };
    helpers.run(n_parts, work);

    tokenized out;
    for (size_t k = 0; k < n_parts && out.status == tokenize_status::ok; ++k) {
        if (thrown[k]) {
            std::rethrow_exception(thrown[k]);
        }
        for (const size_t end : parts[k].ends) {
            out.ends.push_back(out.tokens.size() + end);
        }
        out.tokens.insert(out.tokens.end(), parts[k].tokens.begin(), parts[k].tokens.end());
        out.status = parts[k].status;
        out.n_tokens = parts[k].n_tokens;
    }
    return out;
}

}  // namespace llamacrab
