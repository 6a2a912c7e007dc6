// Files: reads and writes that are disturbed, limits, weight files that change or cannot be opened again, and the
// folder that several processes write to.

#include "check.h"
#include "io/address_space.h"
#include "io/cache_file.h"
#include "io/cache_folder.h"
#include "io/file.h"
#include "io/read_trace.h"
#include "io/weight_file.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

using namespace superllama;

namespace fs = std::filesystem;

// no trace is asked for here
std::shared_ptr<read_trace> read_trace::of_process() {
    return nullptr;
}

read_trace::~read_trace() {}

int read_trace::add_file(const std::string &) {
    return 0;
}

void read_trace::add_read(int, uint64_t, size_t) {}

static bool contains(const std::string & text, const std::string & part) {
    return text.find(part) != std::string::npos;
}

static descriptor open_new(const std::string & path) {
    return descriptor(open_at(AT_FDCWD, path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600));
}

static void fill(const std::string & path, size_t bytes, char value) {
    std::ofstream(path, std::ios::binary) << std::string(bytes, value);
}

// ------------------------------------------------------------------------------------------------- io/file

struct disturbed : file_calls {
    int interrupts = 0;
    int64_t most = INT64_MAX;

    bool interrupted() {
        errno = EINTR;
        return interrupts-- > 0;
    }
    int64_t read(int fd, void * data, size_t bytes, int64_t offset) override {
        return interrupted() ? -1 : file_calls::read(fd, data, std::min<size_t>(bytes, (size_t) most), offset);
    }
    int64_t write(int fd, const void * data, size_t bytes, int64_t offset) override {
        return interrupted() ? -1 : file_calls::write(fd, data, std::min<size_t>(bytes, (size_t) most), offset);
    }
};

static void test_exact(const std::string & dir) {
    const descriptor file = open_new(dir + "/exact");
    CHECK((fcntl(file.get(), F_GETFD) & FD_CLOEXEC) != 0);
    std::vector<char> data(10000), back(10001);
    for (size_t i = 0; i < data.size(); ++i) {
        data[i] = (char) (i * 7);
    }
    disturbed calls;
    calls.interrupts = 3;
    calls.most = 999;
    CHECK(write_exact(file.get(), data.data(), data.size(), 5, 1, calls).done == data.size());
    calls.interrupts = 3;
    file_result result = read_exact(file.get(), back.data(), data.size(), 5, 1, calls);
    CHECK(result.done == data.size() && result.error == 0);
    CHECK(std::equal(data.begin(), data.end(), back.begin()));
    result = read_exact(file.get(), back.data(), back.size(), 5, 1, calls);
    CHECK(result.done == data.size() && result.error == 0); // the file ends
    result = read_exact(file.get(), back.data(), data.size(), 5, 512, calls);
    CHECK(result.done == 999 && result.error == 0); // not to be gone on with
    calls.most = 512 + 100;
    result = write_exact(file.get(), data.data(), 2048, 0, 512, calls);
    CHECK(result.done == 2048 && result.error == 0);
    calls.most = 100;
    result = write_exact(file.get(), data.data(), 2048, 0, 512, calls);
    CHECK(result.done == 0 && result.error == ENOSPC);
    result = read_exact(-1, back.data(), 1, 0);
    CHECK(result.done == 0 && result.error == EBADF);
}

static void test_limits(const std::string & dir) {
    struct rlimit before = {};
    CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
    const struct rlimit small = { 8192, before.rlim_max };
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    signal(SIGXFSZ, SIG_DFL); // ends the process
    const descriptor file = open_new(dir + "/limit");
    const std::vector<char> data(16384);
    const file_result result = write_exact(file.get(), data.data(), data.size(), 0);
    CHECK(result.done == 8192 && result.error == EFBIG);
    CHECK(contains(file_error(EFBIG), "8192 bytes to a file (ulimit -f)"));
    CHECK(reserve_file(file.get(), 16384) == EFBIG);
    sigset_t pending;
    CHECK(sigpending(&pending) == 0 && sigismember(&pending, SIGXFSZ) == 0);
    CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
    CHECK(reserve_file(file.get(), 16384) == 0);
    CHECK(fs::file_size(dir + "/limit") == 16384);
    CHECK(reserve_file(file.get(), free_bytes(file.get()) * 2 + (1ull << 30)) != 0);
}

// -------------------------------------------------------------------------------------------- weight files

static void test_weight_file(const std::string & dir) {
    const std::string path = dir + "/weights";
    const size_t page = system_page();
    fill(path, 10 * page + 100, 'a');
    const descriptor given(open_at(AT_FDCWD, path.c_str(), O_RDONLY));
    weight_file file(given.get());
    CHECK(file.path() == fs::canonical(path).string());
    std::string error;
    const page_buffer buffer(3 * page);
    const uint8_t * bytes = file.read_bytes(buffer, 2 * page, page / 2 + 1, &error);
    CHECK(bytes != nullptr && bytes[0] == 'a' && bytes[2 * page - 1] == 'a');
    CHECK(file.read_bytes(buffer, 200, 10 * page, &error) == nullptr);
    CHECK(contains(error, "it was cut short") && contains(error, path));
    CHECK(file.read_pages(buffer.data(), page, 10 * page, &error)); // the file ends within
    CHECK(buffer.data()[99] == 'a');

    CHECK(file.take_samples({ 0, 5 * page + 7, 10 * page + 99 }, &error));
    const uint64_t print = file.fingerprint();
    CHECK(file.unchanged(&error));
    const struct timespec times[2] = { { 1000, 0 }, { 1000, 0 } };
    CHECK(utimensat(AT_FDCWD, path.c_str(), times, 0) == 0); // touched
    CHECK(file.unchanged(&error));
    CHECK(file.unchanged(&error));

    fs::copy_file(path, path + ".copy");
    const descriptor other(open_at(AT_FDCWD, (path + ".copy").c_str(), O_RDONLY));
    weight_file copy(other.get());
    CHECK(copy.take_samples({ 0, 5 * page + 7, 10 * page + 99 }, &error));
    CHECK(copy.fingerprint() == print && copy.identity() != file.identity());

    const descriptor writer(open_at(AT_FDCWD, path.c_str(), O_RDWR));
    CHECK(write_exact(writer.get(), "b", 1, 5 * page + 9).error == 0);
    CHECK(!file.unchanged(&error));
    CHECK(contains(error, "still has " + std::to_string(10 * page + 100) + " bytes, but others at offset " +
                              std::to_string(5 * page)));
    CHECK(!file.unchanged(&error)); // it stays an error
    CHECK(ftruncate(writer.get(), 4096) == 0);
    CHECK(!file.unchanged(&error));
    CHECK(contains(error, "it had " + std::to_string(10 * page + 100) + " bytes, now 4096"));
}

static int count_descriptors() {
    return (int) std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator());
}

static void test_descriptors(const std::string & dir) {
    fill(dir + "/many", 8192, 'a');
    const descriptor given(open_at(AT_FDCWD, (dir + "/many").c_str(), O_RDONLY));
    const int before = count_descriptors();
    {
        const weight_file file(given.get());
        std::string error;
        const page_buffer buffer(8192);
        CHECK(file.read_bytes(buffer, 5000, 1001, &error) != nullptr);
        CHECK(count_descriptors() == before + 1);
    }
    CHECK(count_descriptors() == before);
    std::string said;
    try {
        const weight_file file(12345); // none
    } catch (const std::runtime_error & e) {
        said = e.what();
    }
    CHECK(contains(said, strerror(EBADF)));

    struct rlimit limit = {};
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    const struct rlimit small = { (rlim_t) given.get() + 1, limit.rlim_max };
    CHECK(setrlimit(RLIMIT_NOFILE, &small) == 0);
    try {
        const weight_file file(given.get());
    } catch (const std::runtime_error & e) {
        said = e.what();
    }
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    CHECK(contains(said, dir + "/many") && contains(said, "ulimit -n"));
    CHECK(contains(said, "may have " + std::to_string(small.rlim_cur) + " of them open"));
}

// --------------------------------------------------------------------------------------------- cache folder

static void test_places() {
    for (const char * name : { "SUPERLLAMA_CACHE", "XDG_CACHE_HOME", "TMPDIR" }) {
        unsetenv(name);
    }
    const std::string own = "/superllama-" + std::to_string(geteuid());
    setenv("HOME", "/h", 1);
    auto places = cache_places();
    CHECK(places.size() == 2 && !places[0].asked_for && places[1].path == "/tmp" + own);
#ifdef __APPLE__
    CHECK(places[0].path == "/h/Library/Caches/superllama");
#else
    CHECK(places[0].path == "/h/.cache/superllama");
    setenv("XDG_CACHE_HOME", "/x", 1);
    CHECK(cache_places()[0].path == "/x/superllama");
    for (const char * relative : { "x", "~/x", "./x", "" }) {
        setenv("XDG_CACHE_HOME", relative, 1);
        CHECK(cache_places()[0].path == "/h/.cache/superllama");
    }
#endif
    setenv("TMPDIR", "/t", 1);
    CHECK(cache_places()[1].path == "/t" + own);
    setenv("TMPDIR", "t", 1);
    CHECK(cache_places()[1].path == "/tmp" + own);
    for (const char * home : { "", "h", "~" }) {
        setenv("HOME", home, 1);
        for (const cache_place & place : cache_places()) {
            CHECK(place.path[0] == '/');
        }
    }
    setenv("HOME", "/h", 1);
    setenv("SUPERLLAMA_CACHE", "/s", 1);
    places = cache_places();
    CHECK(places.size() == 1 && places[0].asked_for && places[0].path == "/s");
    setenv("SUPERLLAMA_CACHE", "~/s", 1);
    CHECK(cache_places()[0].path == "/h/s");
    setenv("SUPERLLAMA_CACHE", "~other/s", 1);
    CHECK(cache_places()[0].path == "~other/s"); // a name like any other
}

static const auto nobody_else = [] { return false; };

static void test_writer(const std::string & root, bool unnamed) {
    cache_dir dir;
    std::string why;
    CHECK(!dir.open(root, "files", false, &why));
    CHECK(dir.open(root, "files", true, &why));
    CHECK(!dir.file("a", O_RDONLY, &why) && why == "there is none yet");
    const auto count = [&] { return std::distance(fs::directory_iterator(dir.path()), fs::directory_iterator()); };
    const page_buffer buffer(4096);
    memset(buffer.data(), 'w', 4096);

    { // nothing is left of one that is given up, and it is no leftover while it lives
        cache_writer writer(dir, unnamed);
        CHECK(writer.create(8192, &why) && writer.write(buffer.data(), 4096, 4096, &why));
        dir.remove_leftovers();
        CHECK(count() == (unnamed ? 0 : 1));
    }
    CHECK(count() == 0);
    {
        cache_writer writer(dir, unnamed);
        CHECK(writer.create(8192, &why) && writer.write(buffer.data(), 4096, 4096, &why) && writer.finish(&why));
        CHECK(writer.publish("a", nobody_else, &why));
    }
    CHECK(count() == 1);
    const descriptor first = dir.file("a", O_RDONLY, &why);
    char got = 0;
    CHECK(first && read_exact(first.get(), &got, 1, 8191).done == 1 && got == 'w');
    { // a good one stays, another one is replaced in one step
        cache_writer writer(dir, unnamed);
        CHECK(writer.create(4096, &why) && writer.publish("a", [] { return true; }, &why));
    }
    CHECK(count() == 1 && fs::file_size(dir.path() + "/a") == 8192);
    {
        cache_writer writer(dir, unnamed);
        CHECK(writer.create(4096, &why) && writer.publish("a", nobody_else, &why));
    }
    CHECK(count() == 1 && fs::file_size(dir.path() + "/a") == 4096);
    CHECK(read_exact(first.get(), &got, 1, 8191).done == 1); // who has it open, keeps it

    { // no room, with the numbers
        cache_writer writer(dir, unnamed);
        CHECK(!writer.create(1ull << 60, &why));
        CHECK(contains(why, dir.path()) && contains(why, std::to_string((1ull << 60) >> 20) + " MiB"));
    }
    CHECK(count() == 1);

    // many at once, of which one stays
    std::atomic<int> n_ok{ 0 };
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i) {
        threads.emplace_back([&, i] {
            std::string reason;
            cache_writer writer(dir, unnamed);
            const page_buffer mine(4096);
            memset(mine.data(), 'A' + i, 4096);
            n_ok += writer.create(4096, &reason) && writer.write(mine.data(), 4096, 0, &reason) &&
                    writer.finish(&reason) && writer.publish("b", [] { return true; }, &reason);
            dir.remove_leftovers();
        });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    CHECK(n_ok == 8 && count() == 2);
    std::vector<char> whole(4096);
    const descriptor b = dir.file("b", O_RDONLY, &why);
    CHECK(read_exact(b.get(), whole.data(), 4096, 0).done == 4096);
    CHECK(std::count(whole.begin(), whole.end(), whole[0]) == 4096);
    fs::remove_all(dir.path());
}

static void test_leftovers(const std::string & root) {
    cache_dir dir;
    std::string why;
    CHECK(dir.open(root, "left", true, &why));
    const auto path = [&](const char * name) { return dir.path() + "/" + name; };
    for (const char * name : { "dead.writing", "live.writing", "x.blocks.12", "old.blocks.12", "x.blocks", "other" }) {
        fill(path(name), 10, 'x');
    }
    const struct timespec times[2] = { { 1000, 0 }, { 1000, 0 } };
    for (const char * name : { "old.blocks.12", "other", "x.blocks", "live.writing" }) {
        CHECK(utimensat(AT_FDCWD, path(name).c_str(), times, 0) == 0);
    }
    const descriptor live(open_at(AT_FDCWD, path("live.writing").c_str(), O_RDWR));
    CHECK(flock(live.get(), LOCK_EX) == 0);
    CHECK(symlink("other", path("link.writing").c_str()) == 0);
    CHECK(mkfifo(path("pipe.writing").c_str(), 0600) == 0);
    dir.remove_leftovers();
    CHECK(!fs::exists(path("dead.writing")) && !fs::exists(path("old.blocks.12")));
    for (const char * name : { "live.writing", "x.blocks.12", "x.blocks", "other" }) {
        CHECK(fs::exists(path(name)));
    }
    fs::remove_all(dir.path());
}

static void test_trust(const std::string & root) {
    cache_dir dir;
    std::string why;
    CHECK(dir.open(root, "trust", true, &why));
    const std::string path = dir.path() + "/f";
    fill(path, 10, 'x');
    CHECK(chmod(path.c_str(), 0600) == 0 && dir.file("f", O_RDONLY, &why));
    for (mode_t mode : { 0620, 0602, 0666 }) {
        CHECK(chmod(path.c_str(), mode) == 0 && !dir.file("f", O_RDONLY, &why));
        CHECK(contains(why, "others may write it"));
    }
    CHECK(chmod(path.c_str(), 0644) == 0 && dir.file("f", O_RDONLY, &why));
    CHECK(symlink("f", (dir.path() + "/l").c_str()) == 0 && !dir.file("l", O_RDONLY, &why));
    CHECK(mkfifo((dir.path() + "/p").c_str(), 0600) == 0 && !dir.file("p", O_RDONLY, &why));
    CHECK(!dir.file("../trust", O_RDONLY, &why));
    if (geteuid() == 0) {
        CHECK(chown(path.c_str(), 65534, 65534) == 0 && !dir.file("f", O_RDONLY, &why));
        CHECK(contains(why, "it belongs to user 65534, this is user 0"));
        CHECK(chown(dir.path().c_str(), 65534, 65534) == 0 && !dir.open(root, "trust", true, &why));
        CHECK(contains(why, "it belongs to user 65534"));
        CHECK(chown(dir.path().c_str(), 0, 0) == 0);
    }
    CHECK(chmod(dir.path().c_str(), 0777) == 0 && dir.open(root, "trust", false, &why)); // closed to others
    struct stat st = {};
    CHECK(stat(dir.path().c_str(), &st) == 0 && (st.st_mode & 0777) == 0755);
    CHECK(symlink("trust", (root + "/linked").c_str()) == 0 && !dir.open(root, "linked", true, &why));
    fs::remove_all(root + "/trust");
}

int main(int argc, char ** argv) {
    CHECK(argc == 2); // a folder to write to
    const std::string dir = std::string(argv[1]) + "/files-" + std::to_string(getpid());
    CHECK(mkdir(dir.c_str(), 0700) == 0);
    test_exact(dir);
    test_limits(dir);
    test_weight_file(dir);
    test_descriptors(dir);
    test_places();
    test_writer(dir, true);
    test_writer(dir, false);
    test_leftovers(dir);
    test_trust(dir);
    fs::remove_all(dir);
    printf("ok\n");
}
