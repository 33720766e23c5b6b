// Scratch memory handed out piece by piece.
#pragma once

#include "cpu/vec.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace xsmoe::XSMOE_TIER {
namespace {

// Hands out pieces of a block on cache-line boundaries. Without a block it only counts, so that the code that takes the
// pieces also says how large the block must be.
class Arena {
public:
    explicit Arena(void* block) : block_(static_cast<char*>(block)) {}
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    template <class T>
    T* take(int64_t count) {
        char* piece = block_ == nullptr ? nullptr : block_ + used_;
        used_ += (count * int64_t{sizeof(T)} + 63) / 64 * 64;
#ifdef __SANITIZE_ADDRESS__
        // Between pieces lies memory that nobody may touch.
        if (block_ != nullptr) ASAN_POISON_MEMORY_REGION(block_ + used_, 64);
        used_ += 64;
#endif
        return reinterpret_cast<T*>(piece);
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

// Bytes of the block from which a Scratch, made of an arena and these arguments, takes its pieces.
template <class Scratch, class... Arguments>
int64_t bytes_of(Arguments... arguments) {
    Arena arena(nullptr);
    const Scratch scratch(arena, arguments...);
    return arena.used();
}

}  // namespace
}  // namespace xsmoe::XSMOE_TIER
