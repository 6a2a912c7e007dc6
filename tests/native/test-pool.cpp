// Memory that servers share: whoever follows the shares never has more than all of it together, those that run keep
// what they need, and those that wait get it.

#include "check.h"
#include "server/pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <numeric>
#include <random>
#include <thread>

using namespace superllama;

static const uint64_t MiB = 1 << 20;

static pool_member member(uint64_t lease, uint64_t least, uint64_t full, bool busy = false, int64_t active_ms = 0) {
    pool_member m = {};
    m.lease = lease * MiB;
    m.least = least * MiB;
    m.full = full * MiB;
    m.weight = 1;
    m.is_busy = m.is_active = busy;
    m.active_ms = active_ms;
    return m;
}

static std::vector<uint64_t> shares(const std::vector<pool_member> & members, uint64_t total) {
    std::vector<uint64_t> found = pool_shares(members, total * MiB);
    for (uint64_t & bytes : found) {
        bytes /= MiB;
    }
    return found;
}

using numbers = std::vector<uint64_t>;

static void examples() {
    CHECK((shares({}, 100) == numbers{}));
    CHECK((shares({ member(10, 10, 80, true) }, 100) == numbers{ 80 }));
    // one that runs takes from one that does not, down to what that needs
    CHECK((shares({ member(80, 10, 80), member(20, 10, 200, true) }, 100) == numbers{ 10, 90 }));
    // those that do not run keep what is left, the ones used last first
    CHECK((shares({ member(40, 10, 80, false, 1), member(40, 10, 80, false, 2), member(20, 10, 60, true) }, 100) ==
           numbers{ 10, 30, 60 }));
    // two that run share by weight
    pool_member heavy = member(10, 10, 200, true);
    heavy.weight = 3;
    CHECK((shares({ heavy, member(10, 10, 200, true) }, 100) == numbers{ 70, 30 }));
    // one that waits makes another one give back all of it, but not one that runs
    pool_member waiting = member(0, 60, 60);
    waiting.waiting_ms = 1;
    CHECK((shares({ member(50, 50, 80, false, 5), waiting }, 100) == numbers{ 0, 60 }));
    CHECK((shares({ member(50, 50, 80, true), waiting }, 100) == numbers{ 80, 0 }));
    // in its first pass one takes what is free, and from others what is beyond their part
    const auto first_pass = [](pool_member m) {
        m.is_first_pass = 1;
        return m;
    };
    CHECK((shares({ member(80, 10, 80), first_pass(member(20, 10, 200, true)) }, 100) == numbers{ 50, 50 }));
    CHECK((shares({ member(40, 10, 80), first_pass(member(20, 10, 200, true)) }, 100) == numbers{ 40, 60 }));
    CHECK((shares({ member(80, 10, 80), first_pass(member(20, 10, 40, true)) }, 100) == numbers{ 60, 40 }));
    CHECK((shares({ member(80, 10, 80), first_pass(member(10, 70, 90, true)) }, 100) == numbers{ 30, 70 }));
    pool_member light = member(80, 10, 80);
    heavy = first_pass(heavy);
    CHECK((shares({ light, heavy }, 100) == numbers{ 25, 75 }));
    // three of which one has nothing: it has no part
    CHECK((shares({ member(80, 10, 80), member(0, 10, 80), first_pass(member(20, 10, 200, true)) }, 100) ==
           numbers{ 50, 0, 50 }));
    // beside one that is past its first pass, the others keep what they need
    CHECK((shares({ member(80, 10, 80), first_pass(member(10, 10, 200, true)), member(10, 10, 200, true) }, 100) ==
           numbers{ 10, 45, 45 }));
    // one that has given all back wants nothing
    CHECK((shares({ member(0, 50, 80), member(50, 50, 80) }, 100) == numbers{ 0, 50 }));
}

// Servers that follow: what one gives back is late, as while a batch runs, and what one takes is free.
static void schedule(unsigned seed) {
    std::mt19937 rng(seed);
    const uint64_t total = 1000;
    std::vector<pool_member> members;
    for (int i = 0; i < 5; ++i) {
        const uint64_t least = 50 + rng() % 400;
        members.push_back(member(0, least, least + rng() % 800, false, i));
        members.back().weight = 1 + rng() % 3;
    }
    int64_t now = 1;
    const auto leased = [&] {
        uint64_t sum = 0;
        for (const pool_member & m : members) {
            sum += m.lease;
        }
        return sum;
    };
    const auto step = [&](size_t i) {
        pool_member & m = members[i];
        const uint64_t may = pool_shares(members, total * MiB)[i];
        CHECK(!(m.is_busy && may < std::min(m.least, m.lease)));
        if (may < m.lease && (may > 0 || !m.is_busy)) {
            m.lease = may;
        } else if (may > m.lease) {
            m.lease += std::min(may - m.lease, total * MiB - leased());
        }
        if (m.waiting_ms > 0 && m.lease >= m.least) {
            m.waiting_ms = 0;
            m.is_busy = 1;
        }
        CHECK(leased() <= total * MiB);
    };
    for (int round = 0; round < 2000; ++round, ++now) {
        const size_t i = rng() % members.size();
        pool_member & m = members[i];
        if (rng() % 4 == 0) { // a request comes or ends
            if (m.is_busy) {
                m.is_busy = m.is_active = 0;
            } else if (m.waiting_ms == 0) {
                m.is_active = m.is_first_pass = 1;
                m.active_ms = now;
                (m.lease > 0 ? m.is_busy : m.waiting_ms) = now;
            }
        }
        members[rng() % members.size()].is_first_pass = 0; // it goes on
        step(rng() % members.size());
    }
    for (pool_member & m : members) { // all that runs ends: whoever waits is served, one after the other
        m.is_busy = 0;
        m.is_active = m.waiting_ms > 0;
    }
    for (int round = 0; round < 200; ++round) {
        for (size_t i = 0; i < members.size(); ++i) {
            step(i);
            if (members[i].is_busy) {
                members[i].is_busy = members[i].is_active = 0;
            }
        }
    }
    for (const pool_member & m : members) {
        CHECK(m.waiting_ms == 0);
    }
}

// Many processes and threads at one table; those that end are gone from it.
static void table() {
    char folder[] = "/tmp/superllama-pool-XXXXXX";
    CHECK(mkdtemp(folder) != nullptr);
    setenv("XDG_RUNTIME_DIR", folder, 1);
    memory_pool pool(1, 2);
    for (int p = 0; p < 4; ++p) {
        if (fork() == 0) {
            memory_pool mine(1, 2);
            for (int i = 0; i < 200; ++i) {
                mine.with([&](pool_table & table) {
                    pool_member self = memory_pool::of_this_process();
                    self.lease = 1 + (table.find(self.pid) != nullptr ? table.find(self.pid)->lease : 0);
                    if (pool_member * found = table.find(self.pid)) {
                        *found = self;
                    } else {
                        table.members.push_back(self);
                    }
                });
            }
            bool is_right = false;
            mine.with([&](pool_table & table) { is_right = table.find(getpid())->lease == 200; });
            _exit(is_right ? 0 : 1);
        }
    }
    for (int p = 0; p < 4; ++p) {
        int status = 1;
        wait(&status);
        CHECK(status == 0);
    }
    pool.with([](pool_table & table) { CHECK(table.members.empty()); });
    std::vector<std::thread> threads; // of one process, as a router's requests
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&] {
            for (int i = 0; i < 2000; ++i) {
                pool.with([](pool_table & table) { table.asked++; });
            }
        });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    pool.with([](pool_table & table) { CHECK(table.total() == 8000); });
    pool.remove();
    const std::string inner = std::string(folder) + "/superllama-" + std::to_string(getuid());
    CHECK(rmdir(inner.c_str()) == 0 && rmdir(folder) == 0);
}

// Two processes that wake each other in turns. Where a wake is lost, one waits for a minute, and the other one too.
static void wakes() {
    char folder[] = "/tmp/superllama-pool-XXXXXX";
    CHECK(mkdtemp(folder) != nullptr);
    setenv("XDG_RUNTIME_DIR", folder, 1);
    memory_pool pool(1, 3);
    const uint64_t n_turns = 500;
    // whoever finds an odd or an even total makes it one more
    const auto play = [&](memory_pool & mine, uint64_t parity) {
        for (;;) {
            const uint32_t seen = mine.wakes();
            uint64_t total = 0;
            mine.with([&](pool_table & table) {
                table.asked += table.asked < n_turns && table.asked % 2 == parity ? 1 : 0;
                total = table.asked;
            });
            if (total >= n_turns) {
                return true;
            }
            if (!mine.wait(seen, 60000)) {
                return false;
            }
        }
    };
    if (fork() == 0) {
        memory_pool mine(1, 3);
        _exit(play(mine, 1) ? 0 : 1);
    }
    CHECK(play(pool, 0));
    int status = 1;
    wait(&status);
    CHECK(status == 0);

    const uint32_t before = pool.wakes();
    pool.with([](pool_table &) {});
    CHECK(pool.wakes() == before); // a look wakes nobody
    CHECK(!pool.wait(before, 1));
    std::thread other([&] { pool.wake(); }); // of this process, as a server's requests
    CHECK(pool.wait(before, 60000));
    other.join();
    CHECK(pool.wait(before, 60000));                                       // what came before the wait counts
    pool.with([&](pool_table & table) { CHECK(table.asked == n_turns); }); // a wake changes nothing in the table
    pool.remove();
    const std::string inner = std::string(folder) + "/superllama-" + std::to_string(getuid());
    CHECK(rmdir(inner.c_str()) == 0 && rmdir(folder) == 0);
}

int main() {
    examples();
    for (unsigned seed = 0; seed < 50; ++seed) {
        schedule(seed);
    }
    table();
    wakes();
    puts("ok");
    return 0;
}
