// What all files of ours have in common: descriptors that no child process inherits, reads and writes that go on after
// a signal or a short count, and errors that name the limit that was met.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace superllama {

// A descriptor and its owner. -1 is none.
class descriptor {
  public:
    explicit descriptor(int fd = -1) : fd(fd) {}
    ~descriptor() { reset(); }

    descriptor(descriptor && other) noexcept : fd(other.release()) {}
    descriptor & operator=(descriptor && other) noexcept {
        reset(other.release());
        return *this;
    }

    int get() const { return fd; }
    explicit operator bool() const { return fd >= 0; }
    int release();
    void reset(int other = -1);

  private:
    int fd;
};

// The calls that reads and writes come down to. Replaced where faults are tried out.
struct file_calls {
    virtual ~file_calls() = default;
    virtual int64_t read(int fd, void * data, size_t bytes, int64_t offset);
    virtual int64_t write(int fd, const void * data, size_t bytes, int64_t offset);

    static file_calls & of_system();
};

struct file_result {
    size_t done;
    int error; // an errno. 0: all is done; or the file ends here, where a read has done less
};

// With O_CLOEXEC, and again after a signal. `folder` may be AT_FDCWD. -1 with errno.
int open_at(int folder, const char * path, int flags, unsigned mode = 0);

// Where direct I/O is in use, a call that stops within a sector cannot be gone on with: a read ends there, with what it
// has done, a write goes back to the last multiple of `alignment`.
file_result read_exact(int fd, void * data, size_t bytes, uint64_t offset, size_t alignment = 1,
                       file_calls & calls = file_calls::of_system());
file_result write_exact(int fd, const void * data, size_t bytes, uint64_t offset, size_t alignment = 1,
                        file_calls & calls = file_calls::of_system());

// Room on the disk for a file of so many bytes, which it has from then on. Where the filesystem cannot promise room,
// what is free now decides. An errno; 0 is success.
int reserve_file(int fd, uint64_t bytes);

uint64_t free_bytes(int fd); // that its filesystem has left for this user

bool is_memory(int fd); // its filesystem is memory itself: tmpfs, ramfs

// Past the page cache, which would hold everything a second time; false where the filesystem refuses. For a file that
// is empty: the first block is written to try it.
bool make_direct(int fd);

// Of a file that is not direct: the page cache gives back what was read, or written (which waits for the disk).
void forget_read(int fd, uint64_t offset, uint64_t bytes);
void forget_written(int fd, uint64_t offset, uint64_t bytes);

// What an errno means here: a limit of this process with its number and its name in the shell, or as the system says.
std::string file_error(int error);

} // namespace superllama
