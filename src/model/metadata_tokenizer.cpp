// The vocabulary of a model file: arrays of one length, tokens that differ, pieces that a tokenizer can follow.
#include "model/metadata_check.h"

#include "model/metadata_view.h"

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace superllama {

namespace {

const size_t token_bytes_max = 1 << 14; // tokenizers make tables of all parts of a token

const char * const key_tokens = "tokenizer.ggml.tokens";
const char * const key_types = "tokenizer.ggml.token_type";
const char * const key_scores = "tokenizer.ggml.scores";
const char * const key_merges = "tokenizer.ggml.merges";
const char * const key_charsmap = "tokenizer.ggml.precompiled_charsmap";

int64_t find(const metadata_view & view, const char * key) {
    return gguf_find_key(view.ml.metadata, key);
}

void expect_array(const metadata_view & view, const char * key, std::initializer_list<gguf_type> types,
                  const char * names) {
    if (!view.is_array(key) || std::find(types.begin(), types.end(), view.type(key)) == types.end()) {
        refuse(std::string(key) + " is " + view.type_name(key), std::string("an array of ") + names + " is expected");
    }
}

// One value for each token; more are ignored.
void expect_one_each(const metadata_view & view, const char * key, size_t n_tokens) {
    if (view.count(key) < n_tokens) {
        refuse(std::string(key) + " has " + std::to_string(view.count(key)) + " elements",
               "one for each of " + std::to_string(n_tokens) + " tokens is expected");
    }
}

void check_tokens(const metadata_view & view) {
    const int64_t id = find(view, key_tokens);
    const size_t n = view.count(key_tokens);
    if (n == 0 || n > INT32_MAX) {
        refuse(std::string(key_tokens) + " has " + std::to_string(n) + " elements", "1 to 2^31 - 1 are allowed");
    }
    // The library finds tokens by their text. An empty one gets a text of its own.
    std::unordered_map<std::string_view, size_t> seen;
    seen.reserve(n);
    for (size_t i = 0; i < n; ++i) {
        const std::string_view token = gguf_get_arr_str(view.ml.metadata, id, i);
        if (token.empty()) {
            continue;
        }
        if (token.size() > token_bytes_max) {
            refuse(std::string(key_tokens) + "[" + std::to_string(i) + "] has " + std::to_string(token.size()) +
                       " bytes",
                   "up to " + std::to_string(token_bytes_max) + " are allowed");
        }
        const auto [first, is_new] = seen.emplace(token, i);
        if (!is_new) {
            refuse(std::string(key_tokens) + "[" + std::to_string(i) + "] is \"" + std::string(token.substr(0, 40)) +
                       "\"",
                   "token " + std::to_string(first->second) + " is the same; every token has a text of its own");
        }
    }
}

// The bytes of a token of RWKV, which are written with escapes: of "\\x0a" one, 10.
std::string rwkv_bytes(std::string_view escaped) {
    std::string bytes;
    for (size_t i = 0; i < escaped.size(); ++i) {
        if (escaped[i] != '\\' || i + 1 == escaped.size()) {
            bytes += escaped[i];
            continue;
        }
        const char c = escaped[++i];
        if (c == 'x' && i + 2 < escaped.size()) {
            bytes += (char) strtol(std::string(escaped.substr(i + 1, 2)).c_str(), nullptr, 16);
            i += 2;
        } else {
            bytes += c == 't' ? '\t' : c == 'n' ? '\n' : c == 'r' ? '\r' : c;
        }
    }
    return bytes;
}

// This tokenizer takes the longest token that fits. Where a token begins but none ends, it would stay there for ever:
// what a token begins with is a token itself.
void check_rwkv(const metadata_view & view) {
    const int64_t id = find(view, key_tokens);
    const size_t n = view.count(key_tokens);
    bool begins[256] = {}, alone[256] = {};
    for (size_t i = 0; i < n; ++i) {
        const std::string bytes = rwkv_bytes(gguf_get_arr_str(view.ml.metadata, id, i));
        if (!bytes.empty()) {
            begins[(unsigned char) bytes[0]] = true;
            alone[(unsigned char) bytes[0]] |= bytes.size() == 1;
        }
    }
    for (int c = 0; c < 256; ++c) {
        if (begins[c] && !alone[c]) {
            refuse(std::string(key_tokens) + " have no token for the byte " + std::to_string(c),
                   "every byte that a token begins with has a token of its own");
        }
    }
}

void check_types(const metadata_view & view, size_t n_tokens, const std::string & model) {
    expect_array(view, key_types, { GGUF_TYPE_INT32 }, "signed 32-bit integers");
    expect_one_each(view, key_types, n_tokens);
    const int64_t id_tokens = find(view, key_tokens);
    const auto * types = static_cast<const int32_t *>(gguf_get_arr_data(view.ml.metadata, find(view, key_types)));
    const bool has_bytes = model == "llama" || model == "t5" || model == "gemma4" || model == "gpt2";
    for (size_t i = 0; i < n_tokens && has_bytes; ++i) {
        const char * text = gguf_get_arr_str(view.ml.metadata, id_tokens, i);
        if (types[i] == LLAMA_TOKEN_TYPE_BYTE && strlen(text) < strlen("<0x0")) { // its digits are read where they are
            refuse(std::string(key_types) + "[" + std::to_string(i) + "] says that \"" +
                       std::string(text).substr(0, 40) + "\" is a byte",
                   "a byte is written <0x00> to <0xFF>");
        }
    }
}

void check_scores(const metadata_view & view, size_t n_tokens) {
    expect_array(view, key_scores, { GGUF_TYPE_FLOAT32, GGUF_TYPE_INT32 }, "floats");
    expect_one_each(view, key_scores, n_tokens);
    if (view.type(key_scores) != GGUF_TYPE_FLOAT32) {
        return;
    }
    const auto * scores = static_cast<const float *>(gguf_get_arr_data(view.ml.metadata, find(view, key_scores)));
    for (size_t i = 0; i < n_tokens; ++i) {
        if (std::isnan(scores[i])) { // scores order a queue, and what is no number has no place in an order
            refuse(std::string(key_scores) + "[" + std::to_string(i) + "] is not a number", "a score is expected");
        }
    }
}

void check_merges(const metadata_view & view) {
    expect_array(view, key_merges, { GGUF_TYPE_STRING }, "texts");
    const int64_t id = find(view, key_merges);
    const size_t n = view.count(key_merges);
    if (n > INT32_MAX) {
        refuse(std::string(key_merges) + " has " + std::to_string(n) + " elements", "up to 2^31 - 1 are allowed");
    }
    for (size_t i = 0; i < n; ++i) {
        const char * merge = gguf_get_arr_str(view.ml.metadata, id, i);
        const char * space = merge[0] != '\0' ? strchr(merge + 1, ' ') : nullptr;
        if (space == nullptr) {
            refuse(std::string(key_merges) + "[" + std::to_string(i) + "] is \"" + std::string(merge).substr(0, 40) +
                       "\"",
                   "two pieces with a space between them are expected");
        }
    }
}

// A double array of transitions by bytes, and behind it the texts that replace what was matched. The tokenizer walks
// it in a text that comes later, where nothing catches what it throws, so every walk is done here once.
void check_charsmap(const metadata_view & view) {
    expect_array(view, key_charsmap, { GGUF_TYPE_INT8, GGUF_TYPE_UINT8 }, "bytes");
    const size_t n = view.count(key_charsmap);
    if (n == 0) {
        return;
    }
    const auto * data = static_cast<const char *>(gguf_get_arr_data(view.ml.metadata, find(view, key_charsmap)));
    uint32_t blob = 0;
    if (n > sizeof(blob)) {
        memcpy(&blob, data, sizeof(blob));
    }
    if (n <= sizeof(blob) || (uint64_t) blob + sizeof(blob) >= n) {
        refuse(std::string(key_charsmap) + " has " + std::to_string(n) + " bytes",
               "its table of " + std::to_string(blob) + " bytes and texts behind it do not fit");
    }
    const size_t n_nodes = blob / sizeof(uint32_t);
    const char * texts = data + sizeof(blob) + blob;
    const size_t texts_size = n - sizeof(blob) - blob;
    const auto damaged = [&](size_t node) {
        refuse(std::string(key_charsmap) + " is damaged at node " + std::to_string(node),
               "every transition leads to a node, every match to a text");
    };
    const auto node_at = [&](size_t i) {
        uint32_t node = 0;
        if (i >= n_nodes) {
            damaged(i);
        }
        memcpy(&node, data + sizeof(blob) + i * sizeof(node), sizeof(node));
        return node;
    };
    const auto base_of = [](uint32_t node) { return (node >> 10) << ((node & (1u << 9)) >> 6); };
    const auto check_of = [](uint32_t node) { return node & ((1u << 31) | 0xff); };

    std::vector<bool> seen(n_nodes, false);
    std::vector<uint32_t> open; // places to which a byte is added
    if (n_nodes > 0) {
        open.push_back(base_of(node_at(0)));
    }
    while (!open.empty()) {
        const uint32_t place = open.back();
        open.pop_back();
        for (uint32_t c = 1; c < 256; ++c) {
            const uint32_t i = place ^ c;
            const uint32_t node = node_at(i);
            if (check_of(node) != c || seen[i]) {
                continue;
            }
            seen[i] = true;
            const uint32_t next = i ^ base_of(node);
            if ((node >> 8) & 1) {
                const uint32_t text = node_at(next) & ((1u << 31) - 1);
                if (text >= texts_size || memchr(texts + text, '\0', texts_size - text) == nullptr) {
                    damaged(next);
                }
            }
            open.push_back(next);
        }
    }
}

} // namespace

void check_tokenizer(const metadata_view & view) {
    const std::string model = view.text("tokenizer.ggml.model").value_or("");
    if (model.empty() || model == "none" || model == "no_vocab" || find(view, key_tokens) < 0) {
        return; // without tokens, or said by the load
    }
    expect_array(view, key_tokens, { GGUF_TYPE_STRING }, "texts");
    check_tokens(view);
    const size_t n_tokens = view.count(key_tokens);
    if (find(view, key_types) >= 0) {
        check_types(view, n_tokens, model);
    }
    if (find(view, key_scores) >= 0) {
        check_scores(view, n_tokens);
    }
    if (find(view, key_merges) >= 0) {
        check_merges(view);
    }
    if (model == "rwkv") {
        check_rwkv(view);
    }
    if (find(view, key_charsmap) >= 0 && model == "t5") {
        check_charsmap(view);
    }
}

} // namespace superllama
