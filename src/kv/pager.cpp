#include "kv/pager.h"

#include "base/error.h"
#include "io/address_space.h"
#include "io/readers.h"
#include "llama-impl.h"
#include "superllama.h"

#include "ggml-backend-impl.h"

#include <algorithm>
#include <cstring>

namespace superllama {

using page_id = page_table::page_id;

// ------------------------------------------------------------------------------------------------- buffer

ggml_backend_buffer_t kv_pager::alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    kv_pager & self = *(kv_pager *) buft->context;
    if (self.range != nullptr) { // a copy of cells that someone keeps beside the cache
        return ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    }
    try { // huge pages would hold 2 MiB in every layer for one cell, past the budget
        self.range = std::make_unique<address_range>(size, system_page(), "the KV cache");
        address_commit(self.range->base(), round_up(size, system_page()), page_kind::small);
    } catch (const std::exception & e) {
        self.range.reset();
        self.fail(std::string(e.what()) + " Make the context smaller");
        return nullptr;
    }
    return ggml_backend_buffer_init(buft, buffer_iface(), &self, size);
}

// Reads or writes bytes of the cache. Upstream does that in destructors, which nothing may leave.
template <typename F>
bool kv_pager::reach(const F & bytes) {
    std::string error;
    bool ok = false;
    tried([&] { ok = bytes(&error) || fail(error); });
    failed |= !ok;
    return ok;
}

const ggml_backend_buffer_i & kv_pager::buffer_iface() {
    static const auto self_of = [](ggml_backend_buffer_t buffer) -> kv_pager & {
        return *(kv_pager *) buffer->context;
    };
    static const ggml_backend_buffer_i iface = [] {
        ggml_backend_buffer_i i = {};
        i.free_buffer = [](ggml_backend_buffer_t buffer) {
            kv_pager & self = self_of(buffer);
            self.end_streaming();
            self.pages.reset(); // waits for reads into the memory that goes now
            self.range.reset();
        };
        i.get_base = [](ggml_backend_buffer_t buffer) -> void * { return self_of(buffer).range->base(); };
        i.memset_tensor = [](ggml_backend_buffer_t buffer, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
            kv_pager & self = self_of(buffer);
            uint8_t * at = (uint8_t *) t->data + offset;
            self.reach([&](std::string * error) { return self.pages->write_bytes(at, size, nullptr, value, error); });
        };
        i.set_tensor = [](ggml_backend_buffer_t buffer, ggml_tensor * t, const void * data, size_t offset,
                          size_t size) {
            kv_pager & self = self_of(buffer);
            uint8_t * at = (uint8_t *) t->data + offset;
            const auto write = [&](std::string * error) { return self.pages->write_bytes(at, size, data, 0, error); };
            if (!self.reach(write)) {
                // the cells are taken already: whoever reads this stream must hear of it
                const ggml_tensor * root = t->view_src != nullptr ? t->view_src : t;
                const size_t stream = (size_t) (at - (uint8_t *) root->data) / root->nb[2];
                keep_text(self.broken[std::min(stream, self.broken.size() - 1)], error_text());
            }
        };
        i.get_tensor = [](ggml_backend_buffer_t buffer, const ggml_tensor * t, void * data, size_t offset,
                          size_t size) {
            kv_pager & self = self_of(buffer);
            const auto * at = (const uint8_t *) t->data + offset;
            if (!self.reach([&](std::string * error) { return self.pages->read_bytes(at, size, data, error); })) {
                memset(data, 0, size);
            }
        };
        i.clear = [](ggml_backend_buffer_t buffer, uint8_t value) {
            kv_pager & self = self_of(buffer);
            GGML_ASSERT(value == 0);
            if (self.pages) { // before that it is as the system gave it: zero
                self.end_streaming();
                self.pages->clear();
                for (const ggml_backend_buffer_ptr & there : self.on_device) {
                    if (there != nullptr) {
                        ggml_backend_buffer_clear(there.get(), 0);
                    }
                }
                std::fill(self.broken.begin(), self.broken.end(), "");
            }
        };
        return i;
    }();
    return iface;
}

bool kv_pager::is_paged(const ggml_tensor * tensor) {
    const ggml_backend_buffer_t buffer = tensor->view_src != nullptr ? tensor->view_src->buffer : tensor->buffer;
    return buffer->iface.get_tensor == buffer_iface().get_tensor;
}

bool kv_pager::fail(const std::string & text) {
    LLAMA_LOG_ERROR("%s: %s\n", __func__, text.c_str());
    set_error(text);
    return false;
}

bool kv_pager::take_failure() {
    const bool was = failed;
    failed = false;
    return was;
}

// -------------------------------------------------------------------------------------- pages and their use

bool kv_pager::has_cells(page_id p, const llama_ubatch * of) const {
    const llama_kv_cells & cells = kv.v_cells[pages->stream_of(p)];
    const uint32_t first = pages->first_cell(p), end = first + pages->n_cells_of(p);
    const bool any = of == nullptr || kv.n_stream > 1; // a stream is a sequence then
    for (uint32_t i = first; i < end; ++i) {
        if (cells.is_empty(i)) {
            continue;
        }
        if (any) {
            return true;
        }
        for (uint32_t s = 0; s < of->n_seqs_unq; ++s) {
            if (cells.seq_has(i, of->seq_id_unq[s])) {
                return true;
            }
        }
    }
    return false;
}

page_table::usage kv_pager::inspect(page_id p) const {
    if (moving) { // cells are not to be looked at
        return { true, page_used[p] };
    }
    const uint32_t stream = pages->stream_of(p);
    // a copy that waits for the next decode reads this stream, whatever its cells say
    const auto & waiting = kv.sc_info.ssrc;
    const bool source = std::find(waiting.begin(), waiting.end(), stream) != waiting.end() ||
                        std::find(copy_source.begin(), copy_source.end(), stream) != copy_source.end();
    page_table::usage use = { source, page_used[p] };
    if (kv.n_stream > 1) {
        use.live = source || has_cells(p, nullptr);
        use.last_used = std::max(use.last_used, seq_used[stream]);
        return use;
    }
    const llama_kv_cells & cells = kv.v_cells[stream];
    const uint32_t first = pages->first_cell(p), end = first + pages->n_cells_of(p);
    for (uint32_t i = first; i < end; ++i) {
        for (uint32_t s = 0; !cells.is_empty(i) && s < kv.n_seq_max; ++s) {
            if (cells.seq_has(i, (llama_seq_id) s)) {
                use.live = true;
                use.last_used = std::max(use.last_used, seq_used[s]);
            }
        }
    }
    return use;
}

// Gives back the pages of a stream that hold no cell any more.
void kv_pager::sweep(uint32_t stream) {
    const page_id first = stream * pages->pages_per_stream();
    for (page_id p = first; p < first + pages->pages_per_stream(); ++p) {
        if (!pages->is_empty(p) && !inspect(p).live) {
            pages->drop(p);
        }
    }
}

// ----------------------------------------------------------------------------------------- before a ubatch

bool kv_pager::prepare(const llama_kv_cache::slot_info & sinfo, const llama_ubatch & ubatch, uint32_t n_kv) {
    end_streaming();
    tick++;
    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        seq_used[(size_t) ubatch.seq_id_unq[s]] = tick;
    }
    pages->unpin_all();

    const bool fits =
        std::all_of(cells_on_device.begin(), cells_on_device.end(), [&](uint32_t n) { return n == 0 || n >= n_kv; });
    if (!fits) {
        return fail(format("a device has no memory for %u cells of the KV cache in each of its layers", n_kv));
    }
    std::vector<page_id> writes, needed;
    uint64_t bytes = 0;
    bool restoring = false;
    for (size_t s = 0; s < sinfo.n_stream(); ++s) {
        const auto stream = (uint32_t) sinfo.strm[s];
        const uint32_t used = kv.v_cells[stream].get_used(), added = (uint32_t) sinfo.idxs[s].size();
        if (used == added) {
            broken[stream].clear(); // it began anew
        }
        if (!broken[stream].empty()) {
            return fail(format("sequences of KV stream %u are lost (%s); remove them and decode their tokens again",
                               stream, broken[stream].c_str()));
        }
        if (used < n_used[stream] + added) {
            sweep(stream);
        }
        n_used[stream] = used;

        for (uint32_t cell : sinfo.idxs[s]) {
            const page_id p = pages->page_of(stream, cell);
            if (writes.empty() || writes.back() != p) {
                writes.push_back(p);
            }
        }
    }
    std::sort(writes.begin(), writes.end());
    writes.erase(std::unique(writes.begin(), writes.end()), writes.end());
    for (page_id p : writes) {
        pages->pin(p);
        page_used[p] = tick;
        restoring = restoring || pages->needs_restore(p);
        bytes += pages->in_memory(p) ? 0 : pages->page_charge();
    }

    // all that the graph will read: a page beyond it, or without a cell of these sequences, is masked
    for (size_t s = 0; s < sinfo.n_stream(); ++s) {
        const page_id first = (uint32_t) sinfo.strm[s] * pages->pages_per_stream();
        for (page_id p = first; p < first + pages->pages_per_stream(); ++p) {
            if (pages->is_empty(p)) {
                continue;
            }
            const bool written = std::binary_search(writes.begin(), writes.end(), p);
            if (pages->on_disk(p) && !written && !has_cells(p, &ubatch)) {
                if (kv.n_stream > 1) {
                    pages->drop(p);
                }
                continue;
            }
            if (kv.n_stream == 1 && !written && pages->in_memory(p) && !pages->needs_restore(p)) {
                // which sequences are in it matters only when something has to leave
                needed.push_back(p);
                continue;
            }
            if (!written && (pages->first_cell(p) >= n_kv || (kv.n_stream == 1 && !has_cells(p, &ubatch)))) {
                continue; // read ahead for others
            }
            pages->pin(p);
            needed.push_back(p);
            restoring = restoring || pages->needs_restore(p);
            bytes += written || pages->in_memory(p) ? 0 : pages->page_charge();
        }
    }
    const uint64_t resident = (uint64_t) pages->count().resident_bytes;
    const bool full = resident + bytes > pages->budget_bytes();
    if (kv.n_stream == 1 && (full || restoring)) {
        const auto foreign = [&](page_id p) {
            const bool keep = std::binary_search(writes.begin(), writes.end(), p) || has_cells(p, &ubatch);
            if (keep) {
                pages->pin(p);
            }
            return !keep;
        };
        needed.erase(std::remove_if(needed.begin(), needed.end(), foreign), needed.end());
    }

    std::string error;
    if (full) {
        std::vector<page_id> all = needed;
        for (page_id p : writes) {
            if (pages->is_empty(p)) {
                all.push_back(p);
            }
        }
        if (all.size() * pages->page_charge() > pages->budget_bytes()) {
            if (!host_only) {
                return fail("this batch needs " + kv_mib(all.size() * pages->page_charge()) +
                            " of KV pages at once, --kv-budget leaves " + kv_mib(pages->budget_bytes()) +
                            " for pages, and layer by layer is not possible with a device; raise it, or decode fewer "
                            "or shorter sequences in one batch");
            }
            streaming = kv_layer_run::create(*pages, all, writes, pool != nullptr, &error);
            n_streamed += streaming != nullptr;
            return streaming != nullptr || fail(error);
        }
    }
    if (restoring && !pages->restore(needed, &error)) {
        return fail(error);
    }
    for (page_id p : writes) {
        if (!pages->write(p, &error)) {
            return fail(error);
        }
    }
    return true;
}

// A streamed graph begins: how it is cut into layers.
bool kv_pager::plan(ggml_cgraph * gf) {
    return streaming->plan(gf, layer_of);
}

bool kv_pager::finish() {
    const std::string error = streaming->error();
    end_streaming();
    return error.empty() || fail(error);
}

// ---------------------------------------------------------------------------------- prefetch and statistics

static bool seq_in_page(const llama_kv_cells & cells, uint32_t first, uint32_t n, llama_seq_id seq) {
    for (uint32_t i = first; i < first + n; ++i) {
        if (!cells.is_empty(i) && cells.seq_has(i, seq)) {
            return true;
        }
    }
    return false;
}

int kv_pager::prefetch(llama_seq_id seq) {
    end_streaming();
    pages->unpin_all();
    std::vector<page_id> list;
    const uint32_t stream = kv.seq_to_stream[(size_t) seq], n = pages->pages_per_stream();
    for (page_id p = stream * n; p < (stream + 1) * n; ++p) {
        if (!pages->is_empty(p) && seq_in_page(kv.v_cells[stream], pages->first_cell(p), pages->n_cells_of(p), seq)) {
            page_used[p] = tick + 1;
            list.push_back(p);
        }
    }
    return pages->prefetch(list, -1, true);
}

void kv_pager::count_seq(llama_seq_id seq, struct superllama_kv_seq_pages & out) const {
    const uint32_t stream = kv.seq_to_stream[(size_t) seq], n = pages->pages_per_stream();
    const llama_kv_cells & cells = kv.v_cells[stream];
    for (page_id p = stream * n; p < (stream + 1) * n; ++p) {
        const uint32_t first = pages->first_cell(p);
        if (!seq_in_page(cells, first, pages->n_cells_of(p), seq)) {
            continue;
        }
        for (uint32_t i = first; i < first + pages->n_cells_of(p); ++i) {
            out.tokens += !cells.is_empty(i) && cells.seq_has(i, seq);
        }
        out.pages_cpu += pages->n_resident(p) > 0;
        out.pages_disk += pages->n_resident(p) == 0 && pages->on_disk(p);
        out.resident_bytes += (int64_t) pages->resident_bytes(p);
    }
}

void kv_pager::count(struct superllama_kv_pages & out) const {
    const kv_counters & c = pages->count();
    out.paged = true;
    out.page_size = params.kv_page_size;
    out.page_bytes = (int64_t) pages->page_charge_max();
    out.budget_bytes = (int64_t) pages->budget_bytes();
    out.resident_bytes = c.resident_bytes;
    out.resident_peak_bytes = c.resident_peak_bytes;
    out.pages_cpu = c.pages_cpu;
    out.pages_disk = c.pages_disk;
    out.evicted_clean = c.evicted_clean;
    out.evicted_dirty = c.evicted_dirty;
    out.dropped = c.dropped;
    out.restored = c.restored;
    out.prefetched = c.prefetched;
    out.prefetched_used = c.prefetched_used;
    out.prefetched_wasted = c.prefetched_wasted;
    out.ubatches_streamed = n_streamed;
    out.bytes_read = c.bytes_read;
    out.bytes_written = c.bytes_written;
    out.stall_ms = (double) c.stall_us / 1000.0;
}

} // namespace superllama
