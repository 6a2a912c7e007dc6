#include "server/logits.h"

#include "common.h"
#include "json.h"
#include "server-common.h"
#include "server/request_body.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

namespace superllama {

void logits_hook::call(const std::vector<llama_token> & tokens, float * scores, size_t n_scores) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    if (is_closed) {
        throw std::runtime_error("the request was cancelled");
    }
    if (scores == nullptr) {
        throw std::runtime_error("the logits are not on the host, where a function could change them");
    }
    if (callback(tokens.data(), tokens.size(), scores, n_scores, user_data) != 0) {
        throw std::runtime_error("the function that changes logits has failed");
    }
}

void logits_hook::close() {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    is_closed = true;
}

bool asker::is_end(const llama_vocab * vocab, llama_token token) const {
    return llama_vocab_is_eog(vocab, token) || std::find(ends.begin(), ends.end(), token) != ends.end();
}

void asker::ban_ends(const llama_vocab * vocab, float * scores) const {
    if (scores == nullptr) {
        throw std::runtime_error("the logits are not on the host, where min_tokens could change them");
    }
    for (llama_token token = 0; token < llama_vocab_n_tokens(vocab); ++token) {
        if (is_end(vocab, token)) {
            scores[token] = -std::numeric_limits<float>::infinity();
        }
    }
}

bool chooses_several_at_once(const common_params & params) {
    const auto & types = params.speculative.types;
    return params.sampling.backend_sampling || params.speculative.has_dft() ||
           std::any_of(types.begin(), types.end(), [](auto type) { return type != COMMON_SPECULATIVE_TYPE_NONE; });
}

// What says itself where a text ends.
static bool has_form(const json & body) {
    const auto is_given = [&](const char * name) { return body.contains(name) && !body.at(name).is_null(); };
    const std::string form =
        is_given("response_format") ? json_value(body.at("response_format"), "type", std::string()) : std::string();
    return is_given("json_schema") || !json_value(body, "grammar", std::string()).empty() ||
           (!form.empty() && form != "text") || (is_given("tools") && !body.at("tools").empty());
}

static uint64_t least_tokens(const json & body, const common_params & params) {
    if (!body.contains("min_tokens") || body.at("min_tokens").is_null()) {
        return 0;
    }
    const json & given = body.at("min_tokens");
    const auto n = given.is_number_integer() ? given.get<int64_t>() : -1;
    if (n < 0 || n > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument("min_tokens: " + given.dump() + " is no number of tokens; it is 0 or more");
    }
    for (const char * name : { "n_predict", "max_tokens", "max_completion_tokens", "max_output_tokens" }) {
        const json most = json_value(body, name, json());
        if (most.is_number_integer() && most.get<int64_t>() >= 0 && most.get<int64_t>() < n) {
            throw std::invalid_argument("min_tokens: " + given.dump() + " are more than the " + most.dump() +
                                        " tokens that there may be");
        }
    }
    if (n > 0 && has_form(body)) {
        throw std::invalid_argument("min_tokens: the form of the answer says where it ends; ask for one of both");
    }
    if (n > 0 && chooses_several_at_once(params)) {
        throw std::invalid_argument("min_tokens: with speculation, or with sampling on a device, several tokens are "
                                    "chosen at once; this server cannot keep the model from ending between them");
    }
    return (uint64_t) n;
}

static std::vector<llama_token> end_tokens(const json & body, int32_t n_vocab) {
    if (!body.contains("stop_token_ids") || body.at("stop_token_ids").is_null()) {
        return {};
    }
    const json & given = body.at("stop_token_ids");
    std::vector<llama_token> ends;
    for (size_t i = 0; given.is_array() && i < given.size(); ++i) {
        const auto token = given.at(i).is_number_integer() ? given.at(i).get<int64_t>() : -1;
        if (token < 0 || token >= n_vocab) {
            throw std::invalid_argument("stop_token_ids: there is no token " + given.at(i).dump() +
                                        "; the vocabulary has 0 to " + std::to_string(n_vocab - 1));
        }
        ends.push_back((llama_token) token);
    }
    if (!given.is_array()) {
        throw std::invalid_argument("stop_token_ids: " + given.dump() + " is no list of tokens");
    }
    return ends;
}

static thread_local std::shared_ptr<asker> of_thread;

std::shared_ptr<asker> asker_of(const std::string & body, int32_t n_vocab, const common_params & params) {
    if (!may_have(body, "min_tokens") && !may_have(body, "stop_token_ids")) {
        return of_thread;
    }
    json parsed;
    try {
        parsed = json::parse(body);
    } catch (const common_json_error &) { // upstream says what is wrong with it
    }
    if (!parsed.is_object()) {
        return of_thread;
    }
    const uint64_t n_least = least_tokens(parsed, params);
    std::vector<llama_token> ends = end_tokens(parsed, n_vocab);
    if (n_least == 0 && ends.empty()) {
        return of_thread;
    }
    return std::make_shared<asker>(asker{ of_thread != nullptr ? of_thread->hook : nullptr, n_least, std::move(ends) });
}

asks_with::asks_with(std::shared_ptr<asker> who) : before(std::move(of_thread)) {
    of_thread = std::move(who);
}

asks_with::~asks_with() {
    of_thread = std::move(before);
}

} // namespace superllama

// a member of upstream's struct, see the patch: whoever makes tokens asks for them
std::shared_ptr<void> server_tokens::asks() {
    return superllama::of_thread;
}
