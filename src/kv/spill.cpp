#include "kv/spill.h"

#include "io/temporary.h"

#include <cerrno>
#include <stdexcept>

#ifndef _WIN32
#    include <fcntl.h>
#    include <sys/stat.h>
#    include <unistd.h>
#endif

namespace superllama {

#ifndef _WIN32

bool kv_spill::is_supported() {
    return true;
}

kv_spill::kv_spill(const std::string & dir_, size_t record_bytes, file_calls * sys_) :
    dir(dir_),
    record_bytes(record_bytes),
    sys(sys_ ? sys_ : &file_calls::of_system()) {
    file = unnamed_file(dir, "a KV spill file");
    direct = make_direct(file.get());
    if (ftruncate(file.get(), 0) != 0) {
        direct = false; // nothing depends on it
    }
}

bool kv_spill::is_memory() const {
    return superllama::is_memory(file.get());
}

void kv_spill::clear() {
    n_records = 0;
    freed.clear();
    if (ftruncate(file.get(), 0) != 0) {
        return; // the space is used again by the next records
    }
}

bool kv_spill::read(int64_t record, size_t offset, void * data, size_t size, std::string * error) const {
    const uint64_t begin = (uint64_t) record * record_bytes + offset;
    const file_result result = read_exact(file.get(), data, size, begin, 1, *sys);
    if (result.done < size) {
        *error = "cannot read a KV page from the spill file in " + dir + ": " +
                 (result.error != 0 ? file_error(result.error) : "the file is shorter than what was written");
        return false;
    }
    if (!direct) {
        forget_read(file.get(), begin, size);
    }
    return true;
}

bool kv_spill::write(int64_t record, size_t offset, const void * data, size_t size, std::string * error) {
    const uint64_t begin = (uint64_t) record * record_bytes + offset;
    const file_result result = write_exact(file.get(), data, size, begin, alignment, *sys);
    if (result.done < size) {
        *error = "cannot write a KV page to the spill file in " + dir + ": " + file_error(result.error) +
                 "; free disk space, or name another folder with --spill-dir, or raise --kv-budget";
        return false;
    }
    if (!direct) {
        forget_written(file.get(), begin, size);
    }
    return true;
}

#else // _WIN32

bool kv_spill::is_supported() {
    return false;
}

kv_spill::kv_spill(const std::string & dir, size_t record_bytes, file_calls *) :
    dir(dir),
    record_bytes(record_bytes),
    sys(&file_calls::of_system()) {
    throw std::runtime_error("KV pages do not spill on this system");
}

bool kv_spill::is_memory() const {
    return false;
}

void kv_spill::clear() {}

bool kv_spill::read(int64_t, size_t, void *, size_t, std::string *) const {
    return false;
}

bool kv_spill::write(int64_t, size_t, const void *, size_t, std::string *) {
    return false;
}

#endif

int64_t kv_spill::acquire() {
    if (freed.empty()) {
        return n_records++;
    }
    const int64_t record = freed.back();
    freed.pop_back();
    return record;
}

void kv_spill::release(int64_t record) {
    freed.push_back(record);
}

} // namespace superllama
