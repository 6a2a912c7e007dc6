#include "model/vocabulary.h"

#include "llama-vocab.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace superllama {

// What an allocator takes for so many bytes, and a string for its text where that is too long to lie within it.
static uint64_t allocated(uint64_t bytes) {
    return std::max<uint64_t>(32, (bytes + sizeof(void *) + 15) / 16 * 16);
}

static uint64_t text_bytes(size_t length) {
    return length < 16 ? 0 : allocated(length + 1);
}

// An entry of a hash table whose hash is kept beside it, its bucket counted: tables are filled to three quarters or so.
static uint64_t entry_bytes(uint64_t key_and_value) {
    return allocated(key_and_value + 2 * sizeof(void *)) + sizeof(void *) * 4 / 3;
}

// Nodes of a trie: prefixes that are not those of another text too.
static uint64_t n_prefixes(std::vector<std::string> texts) {
    std::sort(texts.begin(), texts.end());
    uint64_t n = 0;
    const std::string * before = nullptr;
    for (const std::string & text : texts) {
        size_t same = 0;
        while (before != nullptr && same < std::min(text.size(), before->size()) && text[same] == (*before)[same]) {
            same++;
        }
        n += text.size() - same;
        before = &text;
    }
    return n;
}

// Texts by id, ids by text, pieces by id; pairs of merges; tries of the tokenizers that look for the longest token.
uint64_t vocabulary_bytes(const llama_vocab & vocab) {
    const enum llama_vocab_type type = vocab.get_type();
    uint64_t bytes = 0;
    std::vector<std::string> texts;
    const uint64_t n_tokens = type == LLAMA_VOCAB_TYPE_NONE ? 0 : vocab.n_tokens();
    for (uint64_t id = 0; id < n_tokens; ++id) {
        const std::string & text = vocab.get_token_data((llama_token) id).text;
        bytes += sizeof(llama_vocab::token_data) + entry_bytes(sizeof(std::string) + sizeof(void *)) +
                 2 * text_bytes(text.size()) + sizeof(std::string) +
                 text_bytes(vocab.token_to_piece((llama_token) id).size());
        if (type == LLAMA_VOCAB_TYPE_UGM || type == LLAMA_VOCAB_TYPE_RWKV) {
            texts.push_back(text);
        }
    }
    if (type == LLAMA_VOCAB_TYPE_BPE) {
        for (const std::string & merge : vocab.get_bpe_merges()) {
            const size_t first = std::min(merge.find(' '), merge.size());
            bytes += entry_bytes(2 * sizeof(std::string) + sizeof(void *)) + text_bytes(first) +
                     text_bytes(merge.size() - std::min(merge.size(), first + 1));
        }
    }
    const uint64_t node_bytes = allocated(14 * sizeof(void *)); // of a map: its head, the letter, a map
    return bytes + n_prefixes(std::move(texts)) * node_bytes + vocab.get_precompiled_charsmap().size();
}

} // namespace superllama
