// Conversations to prompts without a server: by the code with which the server answers POST /apply-template.
#include "superllama-engine.h"

#include "api/template_limits.h"
#include "base/assert_guard.h"
#include "chat.h"
#include "common.h"
#include "engine/last_error.h"
#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "server-common.h"

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

struct superllama_chat_template {
    const llama_vocab * vocab;
    server_chat_params params;
};

// As a server's that was told nothing of templates; see server_context_impl::load_model().
static server_chat_params params_of(common_chat_templates_ptr templates) {
    const common_params usual = {};
    server_chat_params found = {};
    found.use_jinja = true;
    found.prefill_assistant = usual.prefill_assistant;
    found.reasoning_format = usual.reasoning_format;
    found.chat_template_kwargs = usual.default_template_kwargs;
    found.enable_thinking = common_chat_templates_support_enable_thinking(templates.get());
    found.tmpls = std::move(templates);
    return found;
}

// Upstream's own says why in the log only. Throws std::runtime_error.
static void check_syntax(const std::string & source) {
    try {
        jinja::lexer lexer;
        const auto lexed = lexer.tokenize(source);
        jinja::parse_from_tokens(superllama::checked_template(lexed));
    } catch (const std::exception & e) {
        throw std::runtime_error(std::string("it cannot be parsed: ") + e.what());
    }
}

extern "C" {

struct superllama_chat_template * superllama_chat_template_make(const struct llama_model * model, const char * source) {
    superllama::engine_error.clear();
    try {
        const superllama::assert_guard guard("the chat template contradicts itself");
        auto made = std::make_unique<superllama_chat_template>();
        made->vocab = llama_model_get_vocab(model);
        const std::string given = source != nullptr ? source : "";
        const char * own = llama_model_chat_template(model, nullptr);
        check_syntax(given.empty() && own != nullptr ? own : given);
        made->params = params_of(common_chat_templates_init(model, given));
        return made.release();
    } catch (const std::exception & e) {
        superllama::engine_error = e.what();
    }
    return nullptr;
}

const char * superllama_chat_template_apply(const struct superllama_chat_template * of, const char * body,
                                            size_t size) {
    static thread_local std::string prompt;
    superllama::engine_error.clear();
    try {
        const superllama::assert_guard guard("the conversation cannot be processed");
        json parsed = json::parse(std::string(body, size));
        std::vector<raw_buffer> no_files;
        common_chat_session no_session;
        prompt = oaicompat_chat_params_parse(of->vocab, parsed, of->params, no_files, no_session)
                     .at("prompt")
                     .get<std::string>();
        return prompt.c_str();
    } catch (const std::exception & e) {
        superllama::engine_error = e.what();
    }
    return nullptr;
}

void superllama_chat_template_free(struct superllama_chat_template * of) {
    delete of;
}

} // extern "C"
