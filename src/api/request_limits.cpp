#include "api/request_limits.h"

#include "base/quoted.h"
#include "common.h"
#include "superllama.h"

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace superllama {

void check_json(const std::string & text) {
    const size_t most_depth = 500;
    const size_t most_key = 8192; // names of properties become names of rules, which a regular expression looks at
    size_t depth = 0;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (c == '"') {
            const size_t end = skip_to(text, i, '"');
            const size_t next = text.find_first_not_of(" \t\r\n", end + 1);
            if (end - i > most_key && next != std::string::npos && text[next] == ':') {
                throw std::runtime_error("the JSON has a key of " + std::to_string(end - i - 1) +
                                         " bytes; the limit is " + std::to_string(most_key));
            }
            i = end;
        } else if (c == '{' || c == '[') {
            if (++depth > most_depth) {
                throw std::runtime_error("the JSON is nested more than " + std::to_string(most_depth) + " levels deep");
            }
        } else if (c == '}' || c == ']') {
            depth -= depth > 0 ? 1 : 0;
        }
    }
}

void check_sampling(const common_params_sampling & sampling, const llama_model * model) {
    const std::string & grammar = common_grammar_value(sampling.grammar);
    const bool is_gbnf = !grammar.empty() && grammar.compare(0, 11, "%llguidance") != 0;
    if (is_gbnf && superllama_check_grammar(llama_model_get_vocab(model), grammar.c_str(), "root") != 0) {
        throw std::invalid_argument(superllama_last_error());
    }
    for (const auto & trigger : sampling.grammar_triggers) {
        if (trigger.type < COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN ||
            trigger.type > COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL) {
            throw std::invalid_argument("grammar_triggers: there is no type " + std::to_string((int) trigger.type));
        }
    }
    if (!(sampling.typ_p >= 0.0f)) { // below, it leaves tokens that a grammar has ruled out
        throw std::invalid_argument("typical_p is " + std::to_string(sampling.typ_p) + "; it is 0 to 1");
    }
    const int32_t most = 1 << 24; // longer than any context, and 64 MiB each
    const struct {
        const char * name;
        int32_t value;
    } windows[] = {
        { "repeat_last_n", sampling.penalty_last_n },
        { "dry_penalty_last_n", sampling.dry_penalty_last_n },
        { "n_prev", sampling.n_prev },
    };
    for (const auto & window : windows) {
        if (window.value > most) {
            throw std::invalid_argument(std::string(window.name) + " is " + std::to_string(window.value) +
                                        " tokens; the limit is " + std::to_string(most) +
                                        ", and a window never needs to be longer than the context");
        }
    }
}

} // namespace superllama
