// The engine: what llama-server does, without HTTP, inside a process. Requests are those of its API, a path and a body
// of JSON, and answers are its JSON; so one documentation serves both. Many requests run at once, in the server's
// slots.
//
// All functions may be called from any thread. Errors are values: nothing ends the process.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#    define SUPERLLAMA_ENGINE_API __declspec(dllexport)
#else
#    define SUPERLLAMA_ENGINE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;
struct llama_model;
struct superllama_engine;
struct superllama_request;

// Why the last call in this thread failed.
SUPERLLAMA_ENGINE_API const char * superllama_engine_error(void);

// The flags that superllama_engine_start() knows, one line each: the names, and "=" after those that take a value.
SUPERLLAMA_ENGINE_API const char * superllama_engine_flags(void);

// How the model in a file drafts for another one, as --spec-type names it: with a head that it has for that, else
// "draft-simple", as any smaller model of the same vocabulary does. --model-draft alone loads it, and nobody asks it.
SUPERLLAMA_ENGINE_API const char * superllama_engine_draft_type(const char * path);

// What the projector in a file takes of the host's memory, beside a model, in its budget: its weights, and the buffers
// of the image that it is warmed up with. Where a device would have them, only what describes its graphs. -1: it cannot
// be read, see superllama_engine_error().
SUPERLLAMA_ENGINE_API int64_t superllama_engine_projector_bytes(const char * path);

// A chat template, run as a server without flags of its own runs it: that of a model, which stays until it is freed, or
// `source`, Jinja or "chatml", unless that is null or "". Null: it cannot be parsed, see superllama_engine_error().
struct superllama_chat_template;
SUPERLLAMA_ENGINE_API struct superllama_chat_template * superllama_chat_template_make(const struct llama_model * model,
                                                                                      const char * source);

// The prompt for a body of POST /apply-template, until this thread's next call. Null: the template refuses it.
SUPERLLAMA_ENGINE_API const char * superllama_chat_template_apply(const struct superllama_chat_template * of,
                                                                  const char * body, size_t size);
SUPERLLAMA_ENGINE_API void superllama_chat_template_free(struct superllama_chat_template * of);

// Loads a model and starts to serve it. `arguments` are flags of superllama-server with their values, without the name
// of a program; flags that print something and end are refused, and the environment is not looked at. `progress` is
// called with 0 to 1 while weights load, in this thread, and stops that by returning false; it may be null. Null: it
// failed, see superllama_engine_error().
SUPERLLAMA_ENGINE_API struct superllama_engine * superllama_engine_start(int32_t n_arguments,
                                                                         const char * const * arguments,
                                                                         bool (*progress)(float done, void * user_data),
                                                                         void * user_data);

// Cancels what runs, waits until it has ended, and frees the model. Handles of requests stay valid.
SUPERLLAMA_ENGINE_API void superllama_engine_stop(struct superllama_engine * engine);

// The context that it runs on, which nobody frees until superllama_engine_release(); null while its memory is given
// back. Whoever computes with it breaks the requests.
SUPERLLAMA_ENGINE_API struct llama_context * superllama_engine_hold(struct superllama_engine * engine);
SUPERLLAMA_ENGINE_API void superllama_engine_release(struct superllama_engine * engine);

// Starts a request: "GET" or "POST", a path such as "/v1/chat/completions" or "/slots/0?action=save", a body of `size`
// bytes. Returns at once; what goes wrong is the answer. Null: there is no memory or no thread for it.
SUPERLLAMA_ENGINE_API struct superllama_request * superllama_engine_submit(struct superllama_engine * engine,
                                                                           const char * method, const char * path,
                                                                           const char * body, size_t size);

// What the caller has to say before each token of an answer is chosen: `tokens` are those of the context so far, prompt
// and answer (of media there are none), `scores` the logits of all `n_scores` tokens of the vocabulary, which it may
// change. 0: go on; anything else ends this request with an error. It runs in the thread that computes for all
// requests, between two batches: they wait for it, and it must not wait for one of them.
typedef int32_t (*superllama_logits_callback)(const int32_t * tokens, size_t n_tokens, float * scores, size_t n_scores,
                                              void * user_data);

// superllama_engine_submit() with that, for requests that generate. It is not called any more when
// superllama_request_free() has returned, which waits for a call that runs. Refused (status 400) where the engine
// speculates, for then several tokens are chosen at once.
SUPERLLAMA_ENGINE_API struct superllama_request *
superllama_engine_submit_with(struct superllama_engine * engine, const char * method, const char * path,
                              const char * body, size_t size, superllama_logits_callback logits, void * user_data);

// Waits for the next piece of the answer, at most `timeout_ms`; below 0: as long as it takes. 1: `data` are `size`
// bytes, valid until the next call for this request. 0: the answer has ended. -1: nothing yet. One that streams gives
// an event a piece ("data: {...}\n\n"), any other gives all of it at once.
SUPERLLAMA_ENGINE_API int superllama_request_next(struct superllama_request * request, int32_t timeout_ms,
                                                  const char ** data, size_t * size);

// The HTTP status; 0 before the first piece. 499: the request was cancelled. 503: the engine was stopped.
SUPERLLAMA_ENGINE_API int superllama_request_status(const struct superllama_request * request);

// The slot stops working for it within a ubatch, or a second where it waits. What has come so far can be read.
SUPERLLAMA_ENGINE_API void superllama_request_cancel(struct superllama_request * request);

// Cancels it if it runs.
SUPERLLAMA_ENGINE_API void superllama_request_free(struct superllama_request * request);

#ifdef __cplusplus
}
#endif
