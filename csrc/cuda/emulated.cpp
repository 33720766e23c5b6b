// CUDA threads as fibers of one CPU thread.

#include "cuda/emulated.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define XSMOE_TELL_SANITIZER 1
#else
#define XSMOE_TELL_SANITIZER 0
#endif

namespace xsmoe::cuda::emulated {

Place place;

namespace {

constexpr size_t stack_bytes = 256 * 1024;
constexpr int lanes_of_warp = 32;

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "emulated CUDA: %s\n", what.c_str());
    std::fflush(stderr);
    std::abort();
}

// The stack of a fiber. The destructor returns it to the pool of the CPU thread.
class Stack {
public:
    Stack() {
        if (!pool().empty()) {
            memory_ = pool().back();
            pool().pop_back();
            return;
        }
        void* taken = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (taken == MAP_FAILED) fail("no memory for the stack of a thread");
        memory_ = taken;
    }
    ~Stack() { pool().push_back(memory_); }
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;

    void* memory() const { return memory_; }

private:
    static std::vector<void*>& pool() {
        static std::vector<void*> free;
        return free;
    }
    void* memory_;
};

// A barrier. The values that its threads exchange stay readable until all threads arrive at it again.
struct Barrier {
    int members = 0, arrived = 0;
    uint64_t rounds = 0;
    const char* collective = "";
    uint64_t left[lanes_of_warp] = {}, seen[lanes_of_warp] = {};
};

struct Copy {
    void* shared;
    const void* global;
    int size, bytes;
};

struct Block;

struct Thread {
    ucontext_t context;
    std::unique_ptr<Stack> stack;
    Place place;
    Block* block;
    Barrier* waits = nullptr;
    uint64_t round = 0;
    const char* at = "";
    bool ended = false;
    std::vector<Copy> begun;
    std::vector<std::vector<Copy>> groups;
};

struct Block {
    std::unique_ptr<unsigned char[]> shared;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Barrier> warps;
    Barrier all;
};

// The running launch.
struct Launch {
    const std::function<void()>* kernel;
    Barrier grid;
    ucontext_t scheduler;
    Thread* current = nullptr;
#if XSMOE_TELL_SANITIZER
    void* scheduler_stack_save = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
#endif
};
Launch* launch = nullptr;

void begin_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#if XSMOE_TELL_SANITIZER
    __sanitizer_start_switch_fiber(save, stack, size);
#endif
}

void end_switch([[maybe_unused]] void* save, [[maybe_unused]] bool from_scheduler) {
#if XSMOE_TELL_SANITIZER
    __sanitizer_finish_switch_fiber(
        save, from_scheduler ? &launch->scheduler_stack : nullptr,
        from_scheduler ? &launch->scheduler_stack_size : nullptr
    );
#endif
}

void to_scheduler(bool for_good) {
    Thread& self = *launch->current;
    void* save = nullptr;
#if XSMOE_TELL_SANITIZER
    begin_switch(for_good ? nullptr : &save, launch->scheduler_stack, launch->scheduler_stack_size);
#else
    static_cast<void>(for_good);
#endif
    swapcontext(&self.context, &launch->scheduler);
    end_switch(save, true);
}

void thread_main() {
    end_switch(nullptr, true);
    (*launch->kernel)();
    launch->current->ended = true;
    to_scheduler(true);
}

void resume(Thread& thread) {
    launch->current = &thread;
    place = thread.place;
    void* save = nullptr;
    begin_switch(&save, thread.stack->memory(), stack_bytes);
    swapcontext(&launch->scheduler, &thread.context);
    end_switch(save, false);
    if (thread.ended) thread.stack.reset();
}

void wait(Barrier& barrier, const char* collective) {
    Thread& self = *launch->current;
    if (barrier.arrived > 0 && barrier.collective != collective && std::strcmp(barrier.collective, collective) != 0) {
        fail(std::string("threads of one barrier wait at ") + barrier.collective + " and at " + collective);
    }
    barrier.collective = collective;
    if (++barrier.arrived == barrier.members) {
        std::copy(barrier.left, barrier.left + lanes_of_warp, barrier.seen);
        barrier.arrived = 0;
        ++barrier.rounds;
        return;
    }
    self.waits = &barrier;
    self.round = barrier.rounds;
    self.at = collective;
    to_scheduler(false);
    self.waits = nullptr;
}

bool can_run(const Thread& thread) { return !thread.ended && (!thread.waits || thread.waits->rounds != thread.round); }

std::string describe(const Thread& thread) {
    const std::string who =
        "thread " + std::to_string(thread.place.thread.x) + " of block " + std::to_string(thread.place.block.x);
    return thread.ended ? who + " has ended" : who + " waits at " + thread.at;
}

void prepare(Thread& thread) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack->memory();
    thread.context.uc_stack.ss_size = stack_bytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, thread_main, 0);
}

std::unique_ptr<Block> make_block(const Grid& grid, dim3 at) {
    auto block = std::make_unique<Block>();
    const auto bytes = static_cast<size_t>(grid.shared_bytes);
    block->shared.reset(static_cast<unsigned char*>(::operator new[](bytes)));
    std::fill_n(block->shared.get(), bytes, static_cast<unsigned char>(0xff));
    block->warps.resize(static_cast<size_t>(grid.threads) / lanes_of_warp);
    for (Barrier& warp : block->warps) warp.members = lanes_of_warp;
    block->all.members = grid.threads;
    for (unsigned x = 0; x < static_cast<unsigned>(grid.threads); ++x) {
        auto thread = std::make_unique<Thread>();
        thread->stack = std::make_unique<Stack>();
        thread->block = block.get();
        thread->place = {{x, 0, 0}, at, {static_cast<unsigned>(grid.threads), 1, 1}, grid.blocks};
        prepare(*thread);
        block->threads.push_back(std::move(thread));
    }
    return block;
}

bool descending() {
    const char* order = std::getenv("XSMOE_EMULATED_ORDER");
    return order && std::string(order) == "descending";
}

void finish(const std::vector<std::unique_ptr<Block>>& blocks) {
    std::vector<Thread*> threads;
    for (const auto& block : blocks) {
        for (const auto& thread : block->threads) threads.push_back(thread.get());
    }
    if (descending()) std::reverse(threads.begin(), threads.end());
    for (size_t left = threads.size(); left > 0;) {
        bool ran = false;
        for (Thread* thread : threads) {
            if (!can_run(*thread)) continue;
            resume(*thread);
            ran = true;
            left -= thread->ended;
        }
        if (!ran) {
            const auto waiting = std::find_if(threads.begin(), threads.end(), [](Thread* one) { return !one->ended; });
            const auto other = std::find_if(threads.begin(), threads.end(), [&](Thread* one) {
                return one->waits != (*waiting)->waits || one->ended;
            });
            fail("deadlock: " + describe(**waiting) + (other == threads.end() ? "" : ", and " + describe(**other)));
        }
    }
}

void complete(const std::vector<Copy>& group) {
    for (const Copy& copy : group) {
        auto* target = static_cast<unsigned char*>(copy.shared);
        std::memcpy(target, copy.global, static_cast<size_t>(copy.bytes));
        std::memset(target + copy.bytes, 0, static_cast<size_t>(copy.size - copy.bytes));
    }
}

}  // namespace

void run(const Grid& grid, const std::function<void()>& kernel) {
    if (grid.threads < 1 || grid.threads > 1024 || grid.threads % lanes_of_warp != 0) {
        fail("a block has " + std::to_string(grid.threads) + " threads, not a multiple of 32 up to 1024");
    }
    if (launch) fail("a kernel launches a kernel");
    Launch mine;
    mine.kernel = &kernel;
    launch = &mine;
    const int64_t count = int64_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
    if (grid.cooperative && count > multiprocessors())
        fail("a cooperative launch has more blocks than fit on the device");
    mine.grid.members = static_cast<int>(grid.cooperative ? count * grid.threads : 0);
    std::vector<std::unique_ptr<Block>> blocks;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t at = descending() ? count - 1 - i : i;
        const auto x = static_cast<unsigned>(at % grid.blocks.x), yz = static_cast<unsigned>(at / grid.blocks.x);
        blocks.push_back(make_block(grid, {x, yz % grid.blocks.y, yz / grid.blocks.y}));
        if (!grid.cooperative) {
            finish(blocks);
            blocks.clear();
        }
    }
    finish(blocks);
    launch = nullptr;
}

const uint64_t* exchange(const char* collective, unsigned lanes, uint64_t value) {
    if (lanes != 0xffffffffu) fail(std::string(collective) + " must be called by a whole warp");
    Block& block = *launch->current->block;
    Barrier& warp = block.warps[place.thread.x / lanes_of_warp];
    warp.left[place.thread.x % lanes_of_warp] = value;
    wait(warp, collective);
    return warp.seen;
}

unsigned char* shared_memory() { return launch->current->block->shared.get(); }

void wait_for_block() { wait(launch->current->block->all, "__syncthreads"); }

void wait_for_grid() {
    if (launch->grid.members == 0) fail("wait_for_grid outside of a cooperative launch");
    wait(launch->grid, "wait_for_grid");
}

void copy_async(void* shared, const void* global, int size, int bytes) {
    const auto from = reinterpret_cast<uintptr_t>(global), to = reinterpret_cast<uintptr_t>(shared);
    const auto boundary = static_cast<uintptr_t>(size);
    if (from % boundary != 0 || to % boundary != 0) {
        fail("a copy of " + std::to_string(size) + " bytes between addresses that are not multiples of it");
    }
    if (bytes < 0 || bytes > size)
        fail("a copy of " + std::to_string(bytes) + " of " + std::to_string(size) + " bytes");
    std::memset(shared, 0xff, static_cast<size_t>(size));
    launch->current->begun.push_back({shared, global, size, bytes});
}

void commit_copies() {
    Thread& self = *launch->current;
    self.groups.push_back(std::move(self.begun));
    self.begun.clear();
}

void wait_for_copies(int open) {
    auto& groups = launch->current->groups;
    while (groups.size() > static_cast<size_t>(open)) {
        complete(groups.front());
        groups.erase(groups.begin());
    }
}

int multiprocessors() {
    const char* asked = std::getenv("XSMOE_EMULATED_MULTIPROCESSORS");
    const int count = asked ? std::atoi(asked) : 3;
    if (count < 1) fail("XSMOE_EMULATED_MULTIPROCESSORS must be at least 1");
    return count;
}

}  // namespace xsmoe::cuda::emulated
