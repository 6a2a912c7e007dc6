// What the slots of a server have computed, on disk while its memory is given back.
#pragma once

#include "io/file.h"
#include "server-context.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace superllama {

class temporary_folder;

// For one thread, while no request runs. What cannot be kept is logged, and computed again when it is asked for.
class conversations {
  public:
    // `should_stop` is asked while the slots work.
    conversations(server_context & server, std::function<bool()> should_stop);
    ~conversations();

    void save(int n_slots, const std::string & spill_dir);
    void restore(); // and the files are gone

  private:
    struct slot_file {
        int id;
        std::string path; // by way of `file`, where that can be
        descriptor file;
    };

    server_task_result_ptr ask_slot(server_task_type type, int id, const std::string & path);

    server_context & server;
    std::function<bool()> should_stop;
    std::vector<slot_file> files;
    std::unique_ptr<temporary_folder> folder; // of those that have names
};

} // namespace superllama
