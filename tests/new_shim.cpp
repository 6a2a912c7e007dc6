// Preloaded by the tests of memory: makes one allocation of C++ fail, counted in the thread that arms it.
#include <cstdlib>
#include <new>

static thread_local long n_before = -1;
static thread_local bool has_failed = false;

extern "C" void new_arm(long after) {
    n_before = after;
    has_failed = false;
}

extern "C" int new_failed() { // whether it did; and no other one fails
    n_before = -1;
    return has_failed;
}

static void * allocate(std::size_t bytes) {
    if (n_before >= 0 && n_before-- == 0) {
        has_failed = true;
        return nullptr;
    }
    return std::malloc(bytes > 0 ? bytes : 1);
}

void * operator new(std::size_t bytes) {
    void * found = allocate(bytes);
    if (found == nullptr) {
        throw std::bad_alloc();
    }
    return found;
}

void * operator new[](std::size_t bytes) {
    return operator new(bytes);
}

void operator delete(void * memory) noexcept {
    std::free(memory);
}

void operator delete[](void * memory) noexcept {
    std::free(memory);
}

void operator delete(void * memory, std::size_t) noexcept {
    std::free(memory);
}

void operator delete[](void * memory, std::size_t) noexcept {
    std::free(memory);
}
