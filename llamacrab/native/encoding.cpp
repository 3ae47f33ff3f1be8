#include "encoding.hpp"

#include <climits>

namespace llamacrab {

namespace {

void append_utf8(std::string & out, uint32_t code) {  // three bytes: every jamo lies in U+1100-11FF
    out += char(0xE0 | (code >> 12));
    out += char(0x80 | ((code >> 6) & 0x3F));
    out += char(0x80 | (code & 0x3F));
}

}  // namespace

std::string decompose_hangul(std::string_view text) {
    constexpr uint32_t first = 0xAC00, last = 0xD7A3, n_vowels = 21, n_finals = 28;
    std::string        out;
    out.reserve(text.size() + text.size() / 2);
    for (size_t i = 0; i < text.size();) {
        const auto byte = [&](size_t k) { return uint32_t(uint8_t(text[i + k])); };
        // A syllable is three bytes that begin with EA..ED.
        const bool three = byte(0) >= 0xEA && byte(0) <= 0xED && i + 2 < text.size();
        const auto code  = three ? (byte(0) & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F) : 0;
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

bool tokenize(const llama_vocab * vocab, std::string_view text, bool parse_special, bool decompose,
              token_vector & out) {
    std::string decomposed;
    if (decompose) {
        for (const char c : text) {
            if (uint8_t(c) >= 0xEA && uint8_t(c) <= 0xED) {
                decomposed = decompose_hangul(text);
                text       = decomposed;
                break;
            }
        }
    }
    const size_t before = out.size();
    // A token a byte is room enough, but for normalisation that lengthens the text.
    int32_t room = int32_t(text.size()) + 8;
    for (int tries = 0; tries < 2; ++tries) {
        out.resize(before + room);
        const int32_t n = llama_tokenize(vocab, text.data(), int32_t(text.size()), out.data() + before,
                                         room, /*add_special=*/false, parse_special);
        if (n >= 0) {
            out.resize(before + n);
            return true;
        }
        if (n == INT32_MIN) {
            break;
        }
        room = -n;
    }
    out.resize(before);
    return false;
}

encode_status encoding::encode(std::string_view text, token_vector & out, int64_t & n_tokens) const {
    const size_t before = out.size();
    const auto   append = [&](const token_vector & ids) { out.insert(out.end(), ids.begin(), ids.end()); };
    const auto   fail   = [&](encode_status status) {
        out.resize(before);
        return status;
    };
    const auto split = [&](std::string_view piece) {
        return tokenize(vocab, piece, parse_special, decompose, out);
    };

    append(prefix);
    const size_t content = out.size();
    if (lead.empty() && trail.empty()) {
        if (!split(text)) {
            return fail(encode_status::uncountable);
        }
    } else if (!split(lead + std::string(text) + trail)) {
        return fail(encode_status::uncountable);
    }
    n_tokens = int64_t(out.size() - before + suffix.size());
    if (n_tokens == 0) {
        return fail(encode_status::empty);
    }
    if (n_tokens > limit) {
        if (!truncate) {
            return fail(encode_status::too_long);
        }
        token_vector closing;
        size_t       n_lead = 0;
        if (!lead.empty() || !trail.empty()) {
            if (!tokenize(vocab, trail, parse_special, decompose, closing)) {
                return fail(encode_status::uncountable);
            }
            out.resize(content);
            split(lead);
            n_lead = out.size() - content;
            out.resize(content);
            split(lead + std::string(text));
        }
        const int64_t room = int64_t(limit) - int64_t(content - before + closing.size() + suffix.size());
        if (room <= int64_t(n_lead)) {
            return fail(encode_status::no_room);
        }
        if (out.size() > content + size_t(room)) {
            out.resize(content + size_t(room));
        }
        append(closing);
    }
    append(suffix);
    return encode_status::ok;
}

}  // namespace llamacrab
