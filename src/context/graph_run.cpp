#include "context/graph_run.h"

#include "llama-context.h"
#include "ggml-impl.h"
#include "kv/pager.h"
#include "weights/scheduler.h"

#include <exception>

namespace superllama {

graph_run::graph_run(llama_context & ctx, layer_sched * weights, expert_banks * banks, kv_pager * pager) :
    ctx(ctx),
    weights(weights),
    banks(banks != nullptr && banks->any() ? banks : nullptr),
    pager(pager) {}

graph_run::~graph_run() {
    end();
}

bool graph_run::fail(const std::string & why) {
    if (failure.empty()) {
        failure = why;
    }
    cut_short = true;
    return false;
}

bool graph_run::begin(ggml_cgraph * gf) {
    if (weights == nullptr && pager == nullptr) {
        return true;
    }
    try {
        if (pager != nullptr && !pager->plan(gf)) {
            return fail(""); // finish() says why
        }
        std::string error;
        if (weights != nullptr) {
            turn = true;
            graph = gf;
            if (!weights->begin_graph(gf, gf->uid, &error)) {
                return fail("the weights could not be read: " + error);
            }
        }
    } catch (const std::exception & e) {
        return fail(e.what());
    }
    // upstream waits at the end of every part of a graph that is watched; one that only devices compute, with all that
    // it needs there, runs on behind this call
    watched = pager != nullptr || weights->has_stops() || (banks != nullptr && banks->shares());
    hooked = watched || banks != nullptr;
    if (watched) {
        ggml_backend_sched_set_eval_callback(ctx.get_sched(), on_node, this);
    }
    if (hooked) {
        ggml_backend_sched_set_copy_callback(ctx.get_sched(), weights != nullptr ? on_copy : nullptr, this);
    }
    return true;
}

// ggml asks before a node whether to stop after it, and calls again once it is computed. Nothing may be thrown through
// its frames.
bool graph_run::on_node(ggml_tensor * node, bool ask, void * data) {
    graph_run & self = *(graph_run *) data;
    try {
        if (self.cut_short && ask) {
            self.skip(node);
            return true;
        }
        return ask ? self.stops_after(node) : !self.cut_short && self.after_node(node);
    } catch (const std::exception & e) {
        self.fail(e.what());
        return ask; // after this node it is heard
    }
}

// Before weights on the host go to a device for one operation. True: nothing is left to be copied. After a failure
// nothing that is watched is computed; the rest of another graph is, with maps that name experts which exist.
bool graph_run::on_copy(ggml_backend * backend, const ggml_tensor * src, ggml_tensor * dst, ggml_cgraph * part,
                        void * data) {
    graph_run & self = *(graph_run *) data;
    const auto nothing = [&] { return expert_banks::copy_nothing(backend, src, dst) || self.watched; };
    if (self.cut_short) {
        return nothing();
    }
    if (!self.turn) {
        return false;
    }
    try {
        std::string error;
        const auto sent = self.copy_slots(backend, src, dst, part, &error);
        if (sent == expert_banks::result::failed) {
            self.stopped = error.empty();
            self.cut_short = self.stopped || !self.fail("experts could not be sent or computed: " + error);
            return nothing();
        }
        if (sent == expert_banks::result::copied) {
            return true;
        }
        bool copied = false;
        return self.weights->before_copy(backend, src, dst, &copied, &error)
                   ? copied
                   : !self.fail("the weights could not be read: " + error);
    } catch (const std::exception & e) {
        self.fail(e.what());
        return nothing();
    }
}

// The map of the slots of a layer's experts on a device, after those that are missing there.
expert_banks::result graph_run::copy_slots(ggml_backend * backend, const ggml_tensor * src, ggml_tensor * dst,
                                           ggml_cgraph * part, std::string * error) {
    if (banks == nullptr) {
        return expert_banks::result::not_ours;
    }
    ggml_backend_sched_t sched = ctx.get_sched();
    const expert_banks::host_side host = {
        ggml_backend_sched_get_backend(sched, ggml_backend_sched_get_n_backends(sched) - 1),
        [this](const ggml_tensor * t) { return original_of(graph, t); },
        [this](const expert_request & r, std::string * why) { return weights->send_experts(r, why); },
        [this](const guessed_experts & g) { weights->send_guessed(g); },
    };
    return banks->copy(backend, src, dst, part, host, error);
}

bool graph_run::stops_after(ggml_tensor * node) {
    const llama_cparams & cp = ctx.get_cparams();
    user_asked = cp.cb_eval != nullptr && cp.cb_eval(node, true, cp.cb_eval_user_data);
    const bool kv = pager != nullptr && pager->is_cut(node);
    const bool stops = turn && weights->stops_after(node);
    if (stops && weights->pieces_of(node) != nullptr) {
        skip(node); // it is computed once the graph stopped there
    }
    return stops || kv || user_asked || (banks != nullptr && banks->stops_after(node));
}

bool graph_run::after_node(ggml_tensor * node) {
    const llama_cparams & cp = ctx.get_cparams();
    const std::vector<uint32_t> * pieces = turn ? weights->pieces_of(node) : nullptr;
    if (pieces != nullptr && !multiply_in_pieces(node, *pieces)) {
        return false;
    }
    if (banks != nullptr) {
        banks->after_node(node);
    }
    if (user_asked && !cp.cb_eval(node, false, cp.cb_eval_user_data)) {
        cut_short = true; // its own wish: no error
        return false;
    }
    if (pager != nullptr && pager->is_cut(node) && !pager->advance()) {
        return fail("");
    }
    std::string error;
    return !turn || weights->after_node(node, &error) || fail("the weights could not be read: " + error);
}

// The first node of every split that is left: backends pass over what is not to be computed.
void graph_run::skip(ggml_tensor * node) {
    skipped.emplace_back(node, node->flags);
    node->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
}

bool graph_run::multiply_in_pieces(ggml_tensor * node, const std::vector<uint32_t> & pieces) {
    if (ggml_is_empty(node)) {
        return true; // no token of this ubatch wants logits
    }
    ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(ctx.get_sched(), node);
    for (uint32_t id : pieces) {
        std::string error;
        weight_piece piece;
        if (!weights->acquire_piece(id, &piece, &error)) {
            return fail("the weights could not be read: " + error);
        }
        const ggml_status status = products.multiply(backend, node, piece);
        weights->release_piece(id);
        if (status == GGML_STATUS_ABORTED) {
            cut_short = true;
            stopped = true;
            return false;
        }
        if (status != GGML_STATUS_SUCCESS) {
            return fail(std::string("the product with ") + node->src[0]->name + " could not be computed");
        }
    }
    return true;
}

void graph_run::unhook() {
    hooked = false;
    ggml_backend_sched_synchronize(ctx.get_sched());
    const llama_cparams & cp = ctx.get_cparams(); // other graphs, a context shift, run with the user's callback
    ggml_backend_sched_set_eval_callback(ctx.get_sched(), cp.cb_eval, cp.cb_eval_user_data);
    ggml_backend_sched_set_copy_callback(ctx.get_sched(), nullptr, nullptr); // they read no weights
    for (const auto & s : skipped) {
        s.first->flags = s.second;
    }
    skipped.clear();
}

bool graph_run::end() {
    if (hooked) {
        unhook();
    }
    const bool kv_ok = pager == nullptr || pager->finish();
    pager = nullptr;
    if (turn) {
        turn = false;
        try {
            if (banks != nullptr) {
                banks->end_graph();
            }
            weights->end_graph();
        } catch (const std::exception & e) {
            fail(e.what());
        }
    }
    return kv_ok && failure.empty() && !stopped;
}

} // namespace superllama
