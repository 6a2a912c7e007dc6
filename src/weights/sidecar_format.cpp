#include "weights/sidecar_format.h"

#include "base/checksum.h"
#include "io/address_space.h"
#include "io/file.h"
#include "io/weight_file.h"

#include <cstring>

#ifdef __linux__
#    include <sys/stat.h>
#endif

namespace superllama {

static const uint64_t magic = 0x3552414345444953ull; // "SIDECAR5"
static const size_t n_origins = 16;

namespace {

// Model files whose bytes were found to be those that the blocks were made from, by weight_store::identity(). They are
// added one by one while others read: each has its own checksum, and one that is half written names nobody.
struct origin {
    uint64_t identity;
    uint64_t check;
};

} // namespace

static origin make_origin(const sidecar_header & head, uint64_t identity) {
    return { identity, checksum(&identity, sizeof(identity), head.key[1]) };
}

static uint64_t checksum_of(const sidecar_header & head) {
    return checksum(&head, offsetof(sidecar_header, self), head.key[0]);
}

static size_t sums_offset() {
    return sizeof(sidecar_header) + n_origins * sizeof(origin);
}

size_t sidecar_data_offset(size_t n_blocks) {
    return round_up(sums_offset() + n_blocks * sizeof(uint64_t), system_page());
}

void sidecar_begin(sidecar_header head, uint64_t identity, const std::vector<uint64_t> & sums, uint8_t * to) {
    const size_t bytes = sums.size() * sizeof(uint64_t);
    head.magic = magic;
    head.sums = checksum(sums.data(), bytes);
    head.self = checksum_of(head);
    const origin mine = make_origin(head, identity);
    memset(to, 0, sidecar_data_offset(sums.size()));
    memcpy(to, &head, sizeof(head));
    memcpy(to + sizeof(head), &mine, sizeof(mine));
    memcpy(to + sums_offset(), sums.data(), bytes);
}

#ifdef __linux__

static bool whole(const file_result & result, size_t bytes, std::string * why) {
    if (result.done < bytes) {
        *why = result.error != 0 ? file_error(result.error) : "the file is too short";
    }
    return result.done == bytes;
}

bool sidecar_read(int fd, const sidecar_header & wanted, uint64_t identity, std::vector<uint64_t> * sums, bool * proven,
                  std::string * why) {
    // whole pages: the file may be open for direct I/O, by whom it was just written
    const size_t begin = sidecar_data_offset(wanted.n_blocks);
    const page_buffer first(begin);
    if (!whole(read_exact(fd, first.data(), begin, 0), begin, why)) {
        return false;
    }
    sidecar_header head = {};
    struct stat st = {};
    memcpy(&head, first.data(), sizeof(head));
    if (head.magic != magic || memcmp(head.key, wanted.key, sizeof(head.key)) != 0 ||
        head.n_blocks != wanted.n_blocks || head.bytes != wanted.bytes || head.self != checksum_of(head) ||
        fstat(fd, &st) != 0 || (uint64_t) st.st_size != wanted.bytes) {
        *why = "it is damaged";
        return false;
    }
    origin origins[n_origins] = {};
    sums->resize(wanted.n_blocks);
    const size_t bytes = sums->size() * sizeof(uint64_t);
    memcpy(origins, first.data() + sizeof(head), sizeof(origins));
    memcpy(sums->data(), first.data() + sums_offset(), bytes);
    if (checksum(sums->data(), bytes) != head.sums) {
        *why = "it is damaged";
        return false;
    }
    const origin mine = make_origin(wanted, identity);
    *proven = false;
    for (const origin & o : origins) {
        *proven = *proven || memcmp(&o, &mine, sizeof(o)) == 0;
    }
    return true;
}

void sidecar_add_origin(int fd, const sidecar_header & head, uint64_t identity) {
    std::string ignored;
    origin origins[n_origins] = {};
    const origin mine = make_origin(head, identity);
    if (!whole(read_exact(fd, origins, sizeof(origins), sizeof(head)), sizeof(origins), &ignored)) {
        return;
    }
    size_t at = identity % n_origins; // where all are taken
    for (size_t i = n_origins; i-- > 0;) {
        if (memcmp(&origins[i], &mine, sizeof(mine)) == 0) {
            return;
        }
        at = origins[i].check == 0 ? i : at;
    }
    write_exact(fd, &mine, sizeof(mine), sizeof(head) + at * sizeof(mine));
}

#endif

} // namespace superllama
