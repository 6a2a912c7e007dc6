#include "kv/layer_run.h"

#include "base/views.h"

#include <algorithm>

namespace superllama {

std::unique_ptr<kv_layer_run> kv_layer_run::create(page_table & pages, const std::vector<page_id> & needed,
                                                   const std::vector<page_id> & writes, bool ahead,
                                                   std::string * error) {
    const uint64_t budget = pages.budget_bytes(), page = pages.page_charge(), layer = pages.layer_charge_max();
    const uint64_t n = needed.size(), ring = ahead && 2 * n * layer <= budget ? 2 : 1;
    if (ring * n * layer > budget) {
        *error = "this batch needs " + kv_mib(n * page) + " of KV pages at once, " + kv_mib(n * layer) +
                 " layer by layer; --kv-budget leaves " + kv_mib(budget) +
                 " for pages; raise it, or decode fewer or shorter sequences in one batch";
        return nullptr;
    }
    const uint64_t n_hot = page > ring * layer ? std::min(n, (budget - ring * n * layer) / (page - ring * layer)) : 0;
    std::unique_ptr<kv_layer_run> run(new kv_layer_run(pages, ring == 2));
    return run->split(needed, writes, n_hot, error) ? std::move(run) : nullptr;
}

// What fits beside the layers stays in memory as a whole: first what is written, then always the same pages, for the
// scan is cyclic.
bool kv_layer_run::split(const std::vector<page_id> & needed, const std::vector<page_id> & written, uint64_t n_hot,
                         std::string * error) {
    const auto is_written = [&](page_id p) { return std::binary_search(written.begin(), written.end(), p); };
    std::vector<page_id> order = written, hot;
    std::copy_if(needed.begin(), needed.end(), std::back_inserter(order), [&](page_id p) { return !is_written(p); });
    for (page_id p : order) {
        pages.pin(p);
        if (hot.size() < n_hot) {
            hot.push_back(p);
            continue;
        }
        cold.push_back(p);
        if (is_written(p)) {
            writes.push_back(p);
        }
        if (!pages.evict(p, error)) {
            return false;
        }
    }
    // what else is in memory belongs to idle sequences; the layers of the cold pages need its place
    if (!pages.restore(hot, error)) {
        return false;
    }
    return std::all_of(hot.begin(), hot.end(), [&](page_id p) { return !is_written(p) || pages.write(p, error); });
}

bool kv_layer_run::plan(ggml_cgraph * gf, const std::unordered_map<const ggml_tensor *, uint32_t> & layer_of) {
    const auto touch = [&](const ggml_tensor * node, const ggml_tensor * t) {
        const auto found = t == nullptr ? layer_of.end() : layer_of.find(t->view_src != nullptr ? t->view_src : t);
        if (found == layer_of.end()) {
            return;
        }
        if (steps.empty() || steps.back().layer != found->second) {
            steps.push_back({ found->second, node });
        }
        steps.back().cut = node;
    };
    for (int n = 0; n < ggml_graph_n_nodes(gf); ++n) {
        const ggml_tensor * node = ggml_graph_node(gf, n);
        if (is_view(node)) {
            continue; // no data is touched
        }
        touch(node, node);
        for (const ggml_tensor * src : node->src) {
            touch(node, src);
        }
    }
    return prepare_layer();
}

// Brings the current step's layer, and starts the next one.
bool kv_layer_run::prepare_layer() {
    if (i >= steps.size()) {
        return true;
    }
    const uint32_t layer = steps[i].layer;
    bool ok = pages.restore_layer(cold, layer, &failure);
    for (size_t w = 0; ok && w < writes.size(); ++w) {
        ok = pages.write_layer(writes[w], layer, &failure);
    }
    if (ok && ahead && i + 1 < steps.size()) {
        pages.prefetch(cold, (int) steps[i + 1].layer, false);
    }
    return ok;
}

bool kv_layer_run::is_cut(const ggml_tensor * node) const {
    return !failure.empty() || (i < steps.size() && steps[i].cut == node);
}

bool kv_layer_run::advance() {
    if (!failure.empty() || !pages.evict_layer(cold, steps[i].layer, &failure)) {
        return false;
    }
    i++;
    return prepare_layer();
}

// After a graph that was cut short some layers are here and some are not, which the next ubatch sorts out.
kv_layer_run::~kv_layer_run() {
    for (size_t c = 0; i < steps.size() && c < cold.size(); ++c) {
        pages.scrub(cold[c]); // nodes may have run without their pages
    }
}

} // namespace superllama
