#include "server/conversations.h"

#include "io/temporary.h"
#include "log.h"

#include <stdexcept>
#include <utility>

#ifndef _WIN32
#    include <fcntl.h>
#    include <unistd.h>
#endif

namespace superllama {

conversations::conversations(server_context & server, std::function<bool()> should_stop) :
    server(server),
    should_stop(std::move(should_stop)) {}

conversations::~conversations() = default;

server_task_result_ptr conversations::ask_slot(server_task_type type, int id, const std::string & path) {
    server_response_reader reader = server.get_response_reader();
    server_task task(type);
    task.id = reader.get_new_id();
    task.slot_action = { id, path, path };
    reader.post_task(std::move(task));
    return reader.next(should_stop);
}

// A file that has no name any more can still be opened by way of its descriptor, where there is /proc.
static std::string path_without_name(const std::string & path, const descriptor & file) {
#ifndef _WIN32
    const std::string by_descriptor = "/proc/self/fd/" + std::to_string(file.get());
    if (file && access(by_descriptor.c_str(), R_OK) == 0) {
        unlink(path.c_str());
        return by_descriptor;
    }
#endif
    return path;
}

void conversations::save(int n_slots, const std::string & spill_dir) {
    files.clear();
    folder.reset();
    if (llama_get_memory(server.get_llama_context()) == nullptr) {
        return; // a model that keeps nothing between two requests
    }
    bool has_names = false;
    try {
        folder = std::make_unique<temporary_folder>(spill_dir, "a folder of conversations");
        for (int id = 0; id < n_slots && !should_stop(); ++id) {
            const std::string path = folder->file("slot-" + std::to_string(id));
            const server_task_result_ptr result = ask_slot(SERVER_TASK_TYPE_SLOT_SAVE, id, path);
            const auto * saved = dynamic_cast<const server_task_result_slot_save_load *>(result.get());
            if (saved == nullptr) {
                LOG_WRN("superllama: the conversation of slot %d cannot be kept: %s\n", id,
                        result == nullptr ? "the server ends" : safe_json_to_str(result->to_json()).c_str());
                continue;
            }
            descriptor file(open_at(AT_FDCWD, path.c_str(), O_RDONLY));
            const std::string by = path_without_name(path, file);
            has_names = has_names || by == path;
            if (saved->n_tokens > 0) {
                files.push_back({ id, by, std::move(file) });
            }
        }
        if (!has_names) {
            folder.reset(); // nothing is left behind, however this process ends
        }
    } catch (const std::exception & e) {
        LOG_WRN("superllama: conversations cannot be kept: %s\n", e.what());
    }
}

void conversations::restore() {
    for (const slot_file & saved : files) {
        const server_task_result_ptr result = ask_slot(SERVER_TASK_TYPE_SLOT_RESTORE, saved.id, saved.path);
        if (dynamic_cast<const server_task_result_slot_save_load *>(result.get()) == nullptr) {
            LOG_WRN("superllama: the conversation of slot %d is computed again: %s\n", saved.id,
                    result == nullptr ? "the server ends" : safe_json_to_str(result->to_json()).c_str());
        }
    }
    files.clear();
    folder.reset();
}

} // namespace superllama
