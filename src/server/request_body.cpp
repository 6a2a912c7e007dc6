#include "server/request_body.h"

#include "api/answer_format.h"
#include "base/quoted.h"
#include "json.h"
#include "server-common.h"

#include <algorithm>
#include <cctype>
#include <iterator>
#include <limits>
#include <stdexcept>

namespace superllama {

bool is_path(const std::string & path, const char * route) {
    const std::string end = route;
    return path.size() >= end.size() && path.compare(path.size() - end.size(), end.size(), end) == 0;
}

bool may_have(const std::string & body, const char * key) {
    const char * const spellings[] = { key, "\\u005", "\\u006", "\\u007" }; // of a key with escapes
    return std::any_of(std::begin(spellings), std::end(spellings),
                       [&](const char * spelling) { return body.find(spelling) != std::string::npos; });
}

// Whether there is a number with ten digits or more, or an exponent, outside of strings: only then is it worth to parse
// the body twice.
static bool has_large_number(const std::string & text) {
    size_t n_digits = 0;
    for (size_t i = 0; i < text.size(); ++i) {
        if (text[i] == '"') {
            i = skip_to(text, i, '"');
        }
        const bool is_exponent = n_digits > 0 && i < text.size() && (text[i] == 'e' || text[i] == 'E');
        n_digits = i < text.size() && isdigit((unsigned char) text[i]) ? n_digits + 1 : 0;
        if (n_digits >= 10 || is_exponent) {
            return true;
        }
    }
    return false;
}

static const char * const read_as_integers[] = {
    "seed",
    "n_predict",
    "max_tokens",
    "n",
    "max_completion_tokens",
    "max_output_tokens",
    "n_indent",
    "n_keep",
    "n_discard",
    "n_cmpl",
    "n_cache_reuse",
    "n_probs",
    "logprobs",
    "top_logprobs",
    "top_k",
    "min_keep",
    "repeat_last_n",
    "dry_penalty_last_n",
    "dry_allowed_length",
    "mirostat",
    "id_slot",
    "dimensions",
    "top_n",
    "reasoning_budget_tokens",
    "thinking_budget_tokens",
};

// Upstream reads these into 32 bits, and cuts what does not fit.
static void check_integer(const std::string & name, const json & value) {
    if (!value.is_number()) {
        return;
    }
    const auto least = (double) std::numeric_limits<int32_t>::min();
    const bool is_seed = name == "seed"; // all 32 bits of which are used
    const auto most =
        is_seed ? (double) std::numeric_limits<uint32_t>::max() : (double) std::numeric_limits<int32_t>::max();
    const auto number = value.get<double>();
    if (!(number >= least && number <= most)) {
        throw std::invalid_argument(name + ": " + value.dump() + " is out of range; integers are " +
                                    std::to_string((int64_t) least) + " to " + std::to_string((int64_t) most));
    }
}

// Tokens in a list, or in lists of such.
static void check_tokens(const json & tokens, int32_t n_vocab) {
    for (size_t i = 0; tokens.is_array() && i < tokens.size(); ++i) {
        const json & token = tokens.at(i);
        check_tokens(token, n_vocab);
        if (token.is_number() && !(token.get<double>() >= 0 && token.get<double>() < n_vocab)) {
            throw std::invalid_argument("there is no token " + token.dump() + "; the vocabulary has 0 to " +
                                        std::to_string(n_vocab - 1));
        }
    }
}

// Upstream asserts that a prompt ends with a token.
static void check_ends(const json & value) {
    if (value.is_array()) {
        for (size_t i = 0; i < value.size(); ++i) {
            check_ends(value.at(i));
        }
    }
    if (!value.is_object() || !value.contains("multimodal_data")) {
        return;
    }
    const std::string prompt = json_value(value, "prompt_string", std::string()), mark = get_media_marker();
    if (prompt.size() >= mark.size() && prompt.compare(prompt.size() - mark.size(), mark.size(), mark) == 0) {
        throw std::invalid_argument("a prompt ends with text, not with an image or a sound; put some behind it");
    }
}

static void check_not_negative(const json & body, const char * name) {
    if (body.contains(name) && body.at(name).is_number_integer() && body.at(name).get<int64_t>() < 0) {
        throw std::invalid_argument(std::string(name) + " is " + body.at(name).dump() + "; it cannot be negative");
    }
}

std::optional<std::string> checked_body(const std::string & path, const std::string & body, int32_t n_vocab) {
    const bool tokenizes = is_path(path, "/tokenize"), detokenizes = is_path(path, "/detokenize");
    const bool reranks = is_path(path, "/rerank") || is_path(path, "/reranking");
    const bool completes =
        !is_path(path, "/chat/completions") && (is_path(path, "/completion") || is_path(path, "/completions"));
    const bool has_form = completes && may_have(body, "format");
    const bool has_two_forms = !completes && body.find("\"grammar\"") != std::string::npos &&
                               body.find("\"json_schema\"") != std::string::npos;
    const bool has_function = body.find("\"logits_processor\"") != std::string::npos;
    const bool has_media = body.find("multimodal_data") != std::string::npos;
    if (!tokenizes && !detokenizes && !reranks && !has_form && !has_two_forms && !has_media && !has_function &&
        !has_large_number(body)) {
        return {};
    }
    json parsed;
    try {
        parsed = json::parse(body);
    } catch (const common_json_error &) {
        return {};
    }
    if (!parsed.is_object()) {
        return {};
    }
    if (has_function && parsed.contains("logits_processor") && !parsed.at("logits_processor").is_null()) {
        throw std::invalid_argument("logits_processor is a function, which JSON cannot hold: it is there for a program "
                                    "in whose process the model is, superllama.LLM in Python");
    }
    for (const char * name : read_as_integers) {
        if (parsed.contains(name)) {
            check_integer(name, parsed.at(name));
        }
    }
    if (has_two_forms && !json_value(parsed, "grammar", std::string()).empty() && parsed.contains("json_schema") &&
        !parsed.at("json_schema").is_null()) {
        throw std::invalid_argument("the form of an answer is a grammar or a json_schema, not both");
    }
    for (const char * name : { "prompt", "input", "content" }) {
        if (has_media && parsed.contains(name)) {
            check_ends(parsed.at(name));
        }
    }
    for (const char * name : { "prompt", "input", "content", "tokens" }) {
        if (parsed.contains(name)) {
            check_tokens(parsed.at(name), n_vocab);
        }
    }
    if (reranks) {
        check_not_negative(parsed, "top_n");
    }
    const json with_form = has_form ? with_schema(parsed) : parsed;
    return has_form ? std::optional<std::string>(with_form.dump()) : std::nullopt;
}

} // namespace superllama
