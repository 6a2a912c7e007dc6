// What moves cells of a paged KV cache between decodes: copies of streams, context shift, saved and loaded states.

#include "llama-context.h"
#include "kv/pager.h"
#include "llama-model.h"

#include <algorithm>

namespace superllama {

using page_id = page_table::page_id;

size_t kv_pager::copy_streams(const llama_kv_cache::stream_copy_info & info) {
    end_streaming();
    pages->unpin_all();
    copy_source = info.ssrc; // they are read here, whatever their cells say by now
    const uint32_t n = pages->pages_per_stream();
    for (size_t c = 0; c < info.ssrc.size(); ++c) {
        const uint32_t src = info.ssrc[c], dst = info.sdst[c];
        std::string error = broken[src];
        bool ok = error.empty();
        for (uint32_t i = 0; i < n; ++i) {
            const page_id from = src * n + i, to = dst * n + i;
            if (!pages->is_empty(to)) {
                pages->drop(to);
            }
            if (ok && !pages->is_empty(from)) {
                page_used[to] = tick;
                ok = pages->copy(from, to, &error);
            }
        }
        for (uint32_t il = 0; ok && il < pages->n_layers(); ++il) {
            for (const auto * streams : { &kv.layers[il].k_stream, &kv.layers[il].v_stream }) {
                if (pages->is_away(il) && (*streams)[src] != nullptr) {
                    ggml_backend_tensor_copy((*streams)[src], (*streams)[dst]);
                }
            }
        }
        n_used[dst] = kv.v_cells[dst].get_used();
        broken[dst] = error;
        if (!ok) {
            fail(error);
        }
    }
    copy_source.clear();
    return 0;
}

// The shift of one page's cells; as llama_kv_cache::build_graph_shift, which spans the whole cache.
class llm_graph_input_page_shift : public llm_graph_input_i {
  public:
    llm_graph_input_page_shift(const llama_kv_cache * kv, std::vector<int32_t> shifts) :
        kv(kv),
        shifts(std::move(shifts)) {}

    void set_input(const llama_ubatch *) override {
        if (k_shift->buffer != nullptr) {
            ggml_backend_tensor_set(k_shift, shifts.data(), 0, ggml_nbytes(k_shift));
        }
        if (k_rot != nullptr && k_rot->buffer != nullptr) {
            kv->set_input_k_rot(k_rot);
        }
    }

    const llama_kv_cache * kv;
    std::vector<int32_t> shifts;
    ggml_tensor * k_shift = nullptr; // I32 [cells]
    ggml_tensor * k_rot = nullptr;
};

bool kv_pager::shift(llama_context * lctx) {
    if (kv.hparams.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return false;
    }
    end_streaming();
    show_all_cells(false); // what is computed refers to those that are there
    const llama_cparams & cparams = lctx->get_cparams();
    // a rotation by nothing leaves f16 and f32 as they are; others are rounded again, as without pages
    const bool exact =
        !ggml_is_quantized(kv.type_k()) && cparams.yarn_ext_factor == 0.0f && cparams.yarn_attn_factor == 1.0f;
    bool updated = false;

    for (page_id p = 0; p < pages->n_pages(); ++p) {
        const uint32_t stream = pages->stream_of(p), first = pages->first_cell(p), n = pages->n_cells_of(p);
        const llama_kv_cells & cells = kv.v_cells[stream];
        if (pages->is_empty(p) || !broken[stream].empty()) {
            continue;
        }
        std::vector<int32_t> shifts(n);
        bool moved = false, live = false;
        for (uint32_t i = 0; i < n; ++i) {
            live = live || !cells.is_empty(first + i);
            shifts[i] = cells.is_empty(first + i) ? 0 : cells.get_shift(first + i);
            moved = moved || shifts[i] != 0;
        }
        if (!live || (!moved && exact)) {
            continue;
        }

        pages->unpin_all();
        pages->pin(p);
        page_used[p] = std::max(page_used[p], moved ? tick : page_used[p]);
        std::string error;
        if (!pages->write(p, &error)) {
            broken[stream] = error;
            fail(error);
            continue;
        }

        ggml_backend_sched_reset(lctx->get_sched());
        llm_graph_result * res = lctx->get_gf_res_reserve();
        res->reset();
        ggml_context * ctx = res->get_ctx();
        ggml_cgraph * gf = res->get_gf();
        auto inp = std::make_unique<llm_graph_input_page_shift>(&kv, std::move(shifts));
        inp->k_shift = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
        ggml_set_input(inp->k_shift);
        inp->k_rot = kv.build_input_k_rot(ctx);
        for (const auto & layer : kv.layers) {
            const uint32_t il = layer.il;
            if (!kv.hparams.has_rope(il)) {
                continue;
            }
            const auto n_rot = kv.hparams.n_rot(il), n_embd_head_k = kv.hparams.n_embd_head_k(il);
            const auto n_embd_nope = kv.hparams.n_lora_kv > 0 ? n_embd_head_k - n_rot : 0;
            const size_t row = ggml_row_size(layer.k->type, kv.hparams.n_embd_k_gqa(il));
            ggml_tensor * k = ggml_view_3d(
                ctx, layer.k, n_rot, kv.hparams.n_head_kv(il), n, ggml_row_size(layer.k->type, n_embd_head_k), row,
                ((size_t) stream * kv.get_size() + first) * row + ggml_row_size(layer.k->type, n_embd_nope));
            ggml_build_forward_expand(gf, kv.build_rope_shift(cparams, ctx, k, inp->k_shift, inp->k_rot,
                                                              kv.model.get_rope_factors(cparams, (int) il),
                                                              kv.model.get_rope_freq_base(cparams, (int) il),
                                                              kv.model.get_rope_freq_scale(cparams, (int) il), il));
        }
        res->add_input(std::move(inp));
        bool ok = ggml_backend_sched_alloc_graph(lctx->get_sched(), gf);
        if (ok) {
            res->set_inputs(nullptr);
            ok = lctx->graph_compute(gf, false) == GGML_STATUS_SUCCESS;
            ggml_backend_sched_synchronize(lctx->get_sched());
        }
        if (!ok) {
            broken[stream] = "the context shift could not be computed";
            fail(broken[stream]);
        }
        updated = true;
    }
    show_all_cells(true);
    return updated;
}

void kv_pager::before_state_write(llama_seq_id seq) {
    end_streaming();
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        if (!broken[s].empty() && (seq < 0 || kv.seq_to_stream[(size_t) seq] == s) && kv.v_cells[s].get_used() > 0) {
            throw std::runtime_error("the KV data of this state is lost: " + broken[s]);
        }
    }
}

void kv_pager::before_state_read(llama_seq_id seq) {
    end_streaming();
    pages->unpin_all();
    if (seq >= 0 && kv.n_stream > 1) {
        broken[kv.seq_to_stream[(size_t) seq]].clear(); // all of it is replaced
    }
}

// What was on devices was written past the pages.
void kv_pager::after_state_read() {
    if (pages->n_here() == pages->n_layers()) {
        return;
    }
    for (page_id p = 0; p < pages->n_pages(); ++p) {
        pages->written_elsewhere(p);
    }
    for (uint32_t stream = 0; stream < kv.n_stream; ++stream) {
        sweep(stream);
    }
}

} // namespace superllama
