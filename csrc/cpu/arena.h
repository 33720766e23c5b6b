// A bump allocator for scratch memory.
#pragma once

#include "cpu/vec.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace xsmoe::XSMOE_ISA {
namespace {

// Allocate parts of a block, aligned to cache lines. Without a block the arena only counts bytes, so that the same code
// computes how large the block must be.
class Arena {
public:
    explicit Arena(void* block) : block_(static_cast<char*>(block)) {}
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    template <class T>
    T* allocate(int64_t count) {
        char* allocated = block_ == nullptr ? nullptr : block_ + used_;
        used_ += (count * int64_t{sizeof(T)} + 63) / 64 * 64;
#ifdef __SANITIZE_ADDRESS__
        // The 64 bytes between two allocations are poisoned.
        if (block_ != nullptr) ASAN_POISON_MEMORY_REGION(block_ + used_, 64);
        used_ += 64;
#endif
        return reinterpret_cast<T*>(allocated);
    }

    int64_t used() const { return used_; }

#ifdef __SANITIZE_ADDRESS__
    ~Arena() {
        if (block_ != nullptr) ASAN_UNPOISON_MEMORY_REGION(block_, used_);
    }
#endif

private:
    char* block_;
    int64_t used_ = 0;
};

// Return the bytes that the constructor of a Scratch allocates from an arena, for these arguments.
template <class Scratch, class... Arguments>
int64_t bytes_of(Arguments... arguments) {
    Arena arena(nullptr);
    const Scratch scratch(arena, arguments...);
    return arena.used();
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
