#include "server/pool.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <thread>

#ifdef __linux__
#    include <fcntl.h>
#    include <linux/futex.h>
#    include <sys/file.h>
#    include <sys/mman.h>
#    include <sys/stat.h>
#    include <sys/syscall.h>
#    include <unistd.h>

#    include <csignal>
#    include <ctime>
#endif

namespace superllama {

// ------------------------------------------------------------------------------------------ shares

// Hands `left` out to `who` by weight, to each up to what it lacks of `most`.
static void share(std::vector<uint64_t> & shares, uint64_t left, std::vector<size_t> who,
                  const std::vector<pool_member> & members) {
    while (left > 0 && !who.empty()) {
        uint64_t weights = 0;
        for (size_t i : who) {
            weights += members[i].weight;
        }
        const uint64_t round = left;
        std::vector<size_t> still;
        for (size_t i : who) {
            const uint64_t lacks = members[i].full - std::min(members[i].full, shares[i]);
            const auto part = (uint64_t) ((double) round * (double) members[i].weight / (double) weights);
            const uint64_t gets = std::min({ lacks, part, left });
            shares[i] += gets;
            left -= gets;
            if (gets < lacks) {
                still.push_back(i);
            }
        }
        if (still.size() == who.size()) {
            return; // each has its part
        }
        who = std::move(still);
    }
}

// Leaves those that are not active what they have of their part of it all.
static void keep_parts(std::vector<uint64_t> & shares, uint64_t & left, const std::vector<size_t> & order,
                       const std::vector<pool_member> & members, uint64_t total) {
    uint64_t weights = 0;
    for (size_t i : order) {
        weights += shares[i] > 0 ? members[i].weight : 0;
    }
    for (size_t i : order) {
        const pool_member & m = members[i];
        if (!m.is_active && shares[i] > 0) {
            const auto part = (uint64_t) ((double) total * (double) m.weight / (double) weights);
            const uint64_t most = std::min(m.lease, part);
            const uint64_t keeps = std::min(left, most - std::min(most, shares[i]));
            shares[i] += keeps;
            left -= keeps;
        }
    }
}

std::vector<uint64_t> pool_shares(const std::vector<pool_member> & members, uint64_t total) {
    std::vector<size_t> order(members.size());
    std::iota(order.begin(), order.end(), size_t(0));
    // those that run stay; those that wait come in turn; the rest as they were used last
    const auto rank = [&](size_t i) {
        const pool_member & m = members[i];
        return m.is_busy && m.lease > 0 ? 0 : m.waiting_ms > 0 ? 1 : 2;
    };
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        if (rank(a) != rank(b)) {
            return rank(a) < rank(b);
        }
        return rank(a) == 1 ? members[a].waiting_ms < members[b].waiting_ms
                            : members[a].active_ms > members[b].active_ms;
    });

    std::vector<uint64_t> shares(members.size(), 0);
    uint64_t left = total;
    std::vector<size_t> active;
    for (size_t i : order) {
        const pool_member & m = members[i];
        const bool wants = m.lease > 0 || m.waiting_ms > 0;
        if (wants && m.least <= left) {
            shares[i] = m.least;
            left -= m.least;
            if (m.is_active) {
                active.push_back(i);
            }
        } else if (m.waiting_ms > 0) {
            break; // nobody overtakes one that waits for as much as it needs
        }
    }
    const auto is_first = [&](size_t i) { return members[i].is_first_pass != 0; };
    if (!active.empty() && std::all_of(active.begin(), active.end(), is_first)) {
        keep_parts(shares, left, order, members, total);
    }
    share(shares, left, active, members);
    left = total - std::accumulate(shares.begin(), shares.end(), uint64_t(0));
    for (size_t i : order) {
        const pool_member & m = members[i];
        if (!m.is_active && shares[i] > 0 && m.lease > shares[i]) {
            const uint64_t keeps = std::min(left, m.lease - shares[i]);
            shares[i] += keeps;
            left -= keeps;
        }
    }
    return shares;
}

uint64_t pool_table::total() const {
    uint64_t most = 0;
    for (const pool_member & m : members) {
        most = std::max(most, m.given);
    }
    return asked > 0 ? asked : most > 0 ? most : automatic;
}

uint64_t pool_table::leased() const {
    uint64_t sum = 0;
    for (const pool_member & m : members) {
        sum += m.lease;
    }
    return sum;
}

pool_member * pool_table::find(int64_t pid) {
    const auto found =
        std::find_if(members.begin(), members.end(), [&](const pool_member & m) { return m.pid == pid; });
    return found == members.end() ? nullptr : &*found;
}

// ------------------------------------------------------------------------------------------ the table

#ifdef __linux__

static const size_t members_max = 64;

// In jiffies since the system began; 0 where there is no such process, or no /proc.
static int64_t start_of(int64_t pid) {
    std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
    std::string line;
    std::getline(stat, line);
    const size_t name_end = line.rfind(')'); // a name may hold anything
    if (name_end == std::string::npos) {
        return 0;
    }
    const char * at = line.c_str() + name_end + 1;
    for (int field = 3; field < 22 && at != nullptr; ++field) {
        at = strchr(at + 1, ' ');
    }
    return at == nullptr ? 0 : atoll(at);
}

static bool is_alive(const pool_member & m) {
    return (kill((pid_t) m.pid, 0) == 0 || errno == EPERM) && start_of(m.pid) == m.started;
}

// The number of wakes, which is written by way of memory only; then two numbers, and the members as they are.
static const size_t table_at = sizeof(uint64_t);
static const size_t head_bytes = 2 * sizeof(uint64_t);

static std::vector<uint8_t> content_of(int fd) {
    std::vector<uint8_t> content(head_bytes + members_max * sizeof(pool_member));
    content.resize(read_exact(fd, content.data(), content.size(), table_at).done);
    return content;
}

static pool_table read_table(const std::vector<uint8_t> & content) {
    pool_table table;
    if (content.size() >= head_bytes) {
        memcpy(&table.asked, content.data(), sizeof(uint64_t));
        memcpy(&table.automatic, content.data() + sizeof(uint64_t), sizeof(uint64_t));
        table.members.resize((content.size() - head_bytes) / sizeof(pool_member));
        std::copy_n(content.data() + head_bytes, table.members.size() * sizeof(pool_member),
                    (uint8_t *) table.members.data());
    }
    return table;
}

static std::vector<uint8_t> written(const pool_table & table) {
    std::vector<uint8_t> content(head_bytes + table.members.size() * sizeof(pool_member));
    memcpy(content.data(), &table.asked, sizeof(uint64_t));
    memcpy(content.data() + sizeof(uint64_t), &table.automatic, sizeof(uint64_t));
    std::copy_n((const uint8_t *) table.members.data(), content.size() - head_bytes, content.begin() + head_bytes);
    return content;
}

// Of the whole file, between processes.
struct table_lock {
    explicit table_lock(int fd) : fd(fd) {
        while (flock(fd, LOCK_EX) != 0 && errno == EINTR) {
        }
    }
    ~table_lock() { flock(fd, LOCK_UN); }
    table_lock(const table_lock &) = delete;
    table_lock & operator=(const table_lock &) = delete;
    int fd;
};

static size_t bytes_of(int fd) {
    struct stat info = {};
    return fstat(fd, &info) == 0 ? (size_t) info.st_size : 0;
}

static std::atomic<uint32_t> * mapped(int fd) {
    static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "the kernel waits for a number of 32 bits");
    void * at = mmap(nullptr, table_at, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return at == MAP_FAILED ? nullptr : (std::atomic<uint32_t> *) at;
}

void memory_pool::unmap::operator()(std::atomic<uint32_t> * at) const {
    munmap(at, table_at);
}

bool memory_pool::is_supported() {
    return true;
}

pool_member memory_pool::of_this_process() {
    pool_member m = {};
    m.pid = getpid();
    m.started = start_of(m.pid);
    m.weight = 1;
    return m;
}

// In a folder of this user, which no other one can write.
memory_pool::memory_pool(int64_t router_pid, int router_port) {
    const char * runtime = getenv("XDG_RUNTIME_DIR");
    const char * tmp = getenv("TMPDIR");
    const bool has_runtime = runtime != nullptr && runtime[0] == '/' && access(runtime, W_OK) == 0;
    std::string folder = has_runtime ? runtime : (tmp != nullptr && tmp[0] == '/' ? tmp : "/tmp");
    folder += "/superllama-" + std::to_string(getuid());
    mkdir(folder.c_str(), 0700);
    struct stat info = {};
    if (lstat(folder.c_str(), &info) != 0 || !S_ISDIR(info.st_mode) || info.st_uid != getuid() ||
        (info.st_mode & 077) != 0) {
        throw std::runtime_error(folder + " is not a folder that only this user may write; remove it, or set TMPDIR");
    }
    path = folder + "/router-" + std::to_string(router_pid) + "-" + std::to_string(router_port) + ".pool";
    file.reset(open_at(AT_FDCWD, path.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW, 0600));
    if (!file) {
        throw std::runtime_error("cannot open " + path + ": " + file_error(errno));
    }
    const table_lock one_process(file.get());
    if (bytes_of(file.get()) >= table_at || ftruncate(file.get(), (off_t) table_at) == 0) {
        n_wakes.reset(mapped(file.get())); // there is something behind its pages
    }
}

void memory_pool::wake() {
    if (n_wakes != nullptr) {
        n_wakes->fetch_add(1);
        syscall(SYS_futex, n_wakes.get(), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }
}

uint32_t memory_pool::wakes() const {
    return n_wakes != nullptr ? n_wakes->load() : 0;
}

bool memory_pool::wait(uint32_t seen, int timeout_ms) const {
    using std::chrono::milliseconds;
    using std::chrono::steady_clock;
    if (n_wakes == nullptr) {
        std::this_thread::sleep_for(milliseconds(std::min(timeout_ms, 20)));
        return false;
    }
    const auto end = steady_clock::now() + milliseconds(timeout_ms);
    while (n_wakes->load() == seen) {
        const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(end - steady_clock::now()).count();
        if (left <= 0) {
            return false;
        }
        const struct timespec most = { (time_t) (left / 1000000000), (long) (left % 1000000000) };
        syscall(SYS_futex, n_wakes.get(), FUTEX_WAIT, seen, &most, nullptr, 0);
    }
    return true;
}

void memory_pool::with(const std::function<void(pool_table &)> & change) {
    if (changes(change)) {
        wake(); // without the locks, which those who wake want
    }
}

// Whether it wrote.
bool memory_pool::changes(const std::function<void(pool_table &)> & change) {
    const std::lock_guard<std::mutex> one_thread(of_threads);
    const table_lock one_process(file.get());

    const std::vector<uint8_t> before = content_of(file.get());
    pool_table table = read_table(before);
    auto & members = table.members;
    members.erase(std::remove_if(members.begin(), members.end(), [](const pool_member & m) { return !is_alive(m); }),
                  members.end());
    change(table);
    if (members.size() > members_max) {
        throw std::runtime_error("more than " + std::to_string(members_max) + " servers of one router share memory");
    }
    const std::vector<uint8_t> after = written(table);
    if (after == before) {
        return false;
    }
    if (write_exact(file.get(), const_cast<uint8_t *>(after.data()), after.size(), table_at).done < after.size() ||
        ftruncate(file.get(), (off_t) (table_at + after.size())) != 0) {
        throw std::runtime_error("the table of shared memory cannot be written: " + file_error(errno));
    }
    return true;
}

void memory_pool::remove() {
    unlink(path.c_str());
}

#else

bool memory_pool::is_supported() {
    return false;
}

pool_member memory_pool::of_this_process() {
    return {};
}

memory_pool::memory_pool(int64_t, int) {
    throw std::runtime_error("servers cannot share memory on this system");
}

void memory_pool::unmap::operator()(std::atomic<uint32_t> *) const {}

void memory_pool::with(const std::function<void(pool_table &)> &) {}

void memory_pool::wake() {}

uint32_t memory_pool::wakes() const {
    return 0;
}

bool memory_pool::wait(uint32_t, int timeout_ms) const {
    std::this_thread::sleep_for(std::chrono::milliseconds(timeout_ms));
    return false;
}

void memory_pool::remove() {}

#endif

} // namespace superllama
