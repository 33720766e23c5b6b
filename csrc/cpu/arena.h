// Scratch memory handed out piece by piece.
#pragma once

#include <cstdint>

namespace xsmoe {

// Hands out pieces of a block on cache-line boundaries. Without a block it only counts, so that the code that takes the
// pieces also says how large the block must be.
class Arena {
public:
    explicit Arena(void* block) : block_(static_cast<char*>(block)) {}

    template <class T>
    T* take(int64_t count) {
        char* piece = block_ == nullptr ? nullptr : block_ + used_;
        used_ += (count * int64_t{sizeof(T)} + 63) / 64 * 64;
        return reinterpret_cast<T*>(piece);
    }

    int64_t used() const { return used_; }

private:
    char* block_;
    int64_t used_ = 0;
};

}  // namespace xsmoe
