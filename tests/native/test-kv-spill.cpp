// The spill file: privacy, records, and a system that fails.

#include "check.h"
#include "kv/spill.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <memory>
#include <stdexcept>

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

using namespace superllama;

static const size_t block = kv_spill::alignment;

struct buffer {
    void * data = nullptr;

    explicit buffer(size_t size, int value = 0) {
        CHECK(posix_memalign(&data, block, size) == 0);
        memset(data, value, size);
    }
    ~buffer() { free(data); }
};

struct faulty : file_calls {
    int fail_errno = 0;       // of the next call
    int64_t most = INT64_MAX; // bytes that one call owns to
    int interrupts = 0;

    int64_t fault() {
        if (interrupts > 0) {
            interrupts--;
            errno = EINTR;
            return -1;
        }
        if (fail_errno != 0) {
            errno = fail_errno;
            return -1;
        }
        return 0;
    }
    int64_t read(int fd, void * data, size_t size, int64_t offset) override {
        return fault() < 0 ? -1 : std::min(most, file_calls::read(fd, data, size, offset));
    }
    int64_t write(int fd, const void * data, size_t size, int64_t offset) override {
        return fault() < 0 ? -1 : std::min(most, file_calls::write(fd, data, size, offset));
    }
};

static void test_records(const std::string & dir) {
    kv_spill file(dir, 4 * block);
    CHECK(std::filesystem::is_empty(dir)); // it has no name
    const int64_t a = file.acquire(), b = file.acquire();
    CHECK(a != b);
    buffer ones(4 * block, 1), twos(4 * block, 2), back(4 * block);
    std::string error;
    CHECK(file.write(a, 0, ones.data, 4 * block, &error));
    CHECK(file.write(b, block, twos.data, 2 * block, &error));
    CHECK(file.read(a, 0, back.data, 4 * block, &error));
    CHECK(memcmp(back.data, ones.data, 4 * block) == 0);
    CHECK(file.read(b, 2 * block, back.data, block, &error));
    CHECK(memcmp(back.data, twos.data, block) == 0);
    CHECK(!file.read(b, 3 * block, back.data, block, &error)); // never written: past the end
    CHECK(error.find("shorter") != std::string::npos);
    file.release(a);
    CHECK(file.acquire() == a);
    file.clear();
    CHECK(file.acquire() == 0);
    CHECK(!file.read(0, 0, back.data, block, &error));
}

static void test_private(const std::string & dir) {
    kv_spill file(dir, block);
    bool found = false;
    DIR * fds = opendir("/proc/self/fd");
    while (const dirent * entry = fds != nullptr ? readdir(fds) : nullptr) {
        char link[4096];
        const std::string path = std::string("/proc/self/fd/") + entry->d_name;
        const ssize_t n = readlink(path.c_str(), link, sizeof(link));
        struct stat st = {};
        if (n > 0 && std::string(link, (size_t) n).rfind(dir, 0) == 0 && stat(path.c_str(), &st) == 0) {
            found = true;
            CHECK((st.st_mode & 0777) == 0600 && st.st_nlink == 0);
        }
    }
    if (fds != nullptr) {
        closedir(fds);
        CHECK(found);
    }
}

static void test_faults(const std::string & dir) {
    faulty sys;
    kv_spill file(dir, 4 * block, &sys);
    const int64_t a = file.acquire();
    buffer ones(4 * block, 1), back(4 * block);
    std::string error;

    for (int reason : { ENOSPC, EIO, EDQUOT }) {
        sys.fail_errno = reason;
        CHECK(!file.write(a, 0, ones.data, 4 * block, &error));
        CHECK(error.find(strerror(reason)) != std::string::npos && error.find(dir) != std::string::npos);
    }
    sys.fail_errno = 0;

    sys.most = (int64_t) block + 100; // a short write goes on from an aligned offset
    CHECK(file.write(a, 0, ones.data, 4 * block, &error));
    sys.most = 100; // less than that can be used for: the disk is full
    CHECK(!file.write(a, 0, ones.data, 4 * block, &error));
    sys.most = (int64_t) block;
    sys.interrupts = 3;
    CHECK(file.read(a, 0, back.data, 4 * block, &error));
    CHECK(memcmp(back.data, ones.data, 4 * block) == 0);
    sys.fail_errno = EIO;
    CHECK(!file.read(a, 0, back.data, 4 * block, &error));
    CHECK(error.find(strerror(EIO)) != std::string::npos);
}

static void test_folders(const std::string & dir) {
    for (const std::string & bad : { std::string("/nonexistent-folder"), std::string("/proc") }) {
        try {
            kv_spill file(bad, block);
            CHECK(false);
        } catch (const std::exception & e) {
            CHECK(std::string(e.what()).find(bad) != std::string::npos);
        }
    }
    const std::string gone = dir + "/gone";
    CHECK(mkdir(gone.c_str(), 0700) == 0);
    kv_spill file(gone, block);
    CHECK(rmdir(gone.c_str()) == 0); // an open file outlives its folder
    buffer ones(block, 1);
    std::string error;
    CHECK(file.write(file.acquire(), 0, ones.data, block, &error));
}

// A folder that is memory is used where it was asked for, and not by default where there is a disk.
static void test_folder_in_memory() {
    const char * const memory = "/dev/shm";
    if (access(memory, W_OK) != 0 || !kv_spill(memory, kv_spill::alignment).is_memory()) {
        return; // there is none here
    }
    CHECK(kv_spill(memory, kv_spill::alignment).folder() == memory);
    const bool disk = !kv_spill("/var/tmp", kv_spill::alignment).is_memory();
    setenv("TMPDIR", memory, 1);
    const kv_spill by_default("", kv_spill::alignment);
    unsetenv("TMPDIR");
    CHECK(by_default.is_memory() == !disk);
    CHECK(by_default.folder() == (disk ? "/var/tmp" : memory));
}

int main(int argc, char ** argv) {
    test_folder_in_memory();
    CHECK(argc == 2); // a folder to write to
    const std::string dir = std::string(argv[1]) + "/spill-" + std::to_string(getpid());
    CHECK(mkdir(dir.c_str(), 0700) == 0);
    test_records(dir);
    test_private(dir);
    test_faults(dir);
    test_folders(dir);
    CHECK(rmdir(dir.c_str()) == 0);
    printf("ok\n");
}
