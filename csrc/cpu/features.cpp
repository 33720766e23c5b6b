#include "cpu/features.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace xsmoe {
namespace {

struct Features {
    bool avx2 = false;
    bool fma = false;
    bool avx512f = false;
    bool avx512bw = false;
    bool avx512dq = false;
    bool avx512vl = false;
    bool avx512_bf16 = false;
    bool amx_tile = false;
    bool amx_bf16 = false;
    bool slow_bf16_pairs = false;
};

#if defined(__x86_64__)

bool bit(uint32_t word, int index) { return (word >> index & 1) != 0; }

// Return the register states that the operating system saves on a context switch.
uint64_t saved_states() {
    uint32_t low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t{high} << 32 | low;
}

// Ask Linux for permission to use the tile registers. The permission holds for all threads of the process.
bool tiles_permitted() {
#if defined(__linux__)
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

Features detect() {
    Features found;
    uint32_t a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(0, &a, &b, &c, &d)) {
        found.slow_bf16_pairs = b == signature_INTEL_ebx && c == signature_INTEL_ecx && d == signature_INTEL_edx;
    }
    if (!__get_cpuid(1, &a, &b, &c, &d)) {
        return found;
    }
    constexpr int osxsave = 27, avx = 28;
    if (!bit(c, osxsave) || !bit(c, avx)) {
        return found;
    }
    constexpr uint64_t avx_states = 0x6, avx512_states = 0xe6, tile_states = 0x60000;
    const uint64_t states = saved_states();
    const auto saves = [states](uint64_t wanted) { return (states & wanted) == wanted; };
    if (!saves(avx_states)) {
        return found;
    }
    found.fma = bit(c, 12);
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        return found;
    }
    const uint32_t subleaves = a;
    found.avx2 = bit(b, 5);
    if (saves(avx512_states)) {
        found.avx512f = bit(b, 16);
        found.avx512dq = bit(b, 17);
        found.avx512bw = bit(b, 30);
        found.avx512vl = bit(b, 31);
    }
    if (saves(tile_states) && bit(d, 24) && tiles_permitted()) {
        found.amx_tile = true;
        found.amx_bf16 = bit(d, 22);
    }
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        found.avx512_bf16 = found.avx512f && bit(a, 5);
    }
    return found;
}

#else

Features detect() { return {}; }

#endif

const Features& features() {
    static const Features found = detect();
    return found;
}

bool can_run(IsaLevel level) { return compiled(level) && supported(level); }

IsaLevel best() {
    IsaLevel best = IsaLevel::baseline;
    for (IsaLevel level : all_isa_levels) {
        // Outside of AMX, Intel's processors multiply pairs of bfloat16 at half the rate of floats: docs/kernels.md.
        const bool pays = level != IsaLevel::avx512_bf16 || !features().slow_bf16_pairs;
        best = can_run(level) && pays ? level : best;
    }
    return best;
}

IsaLevel choose() {
    const char* asked = std::getenv("XSMOE_CPU_TIER");
    if (asked == nullptr || *asked == '\0') {
        return best();
    }
    std::string choice, reason = "it is not an instruction set level";
    for (IsaLevel level : all_isa_levels) {
        if (name(level) == std::string(asked)) {
            if (can_run(level)) {
                return level;
            }
            reason = compiled(level) ? "this processor cannot run it" : "this build leaves it out";
        }
        if (can_run(level)) {
            choice += (choice.empty() ? "" : ", ") + std::string(name(level));
        }
    }
    throw std::runtime_error(
        "XSMOE_CPU_TIER must be one of the instruction set levels that can run here (" + choice + "), not '" + asked +
        "': " + reason
    );
}

}  // namespace

const char* name(IsaLevel level) {
    switch (level) {
        case IsaLevel::baseline:
            return "baseline";
        case IsaLevel::avx2:
            return "avx2";
        case IsaLevel::avx512:
            return "avx512";
        case IsaLevel::avx512_bf16:
            return "avx512_bf16";
        case IsaLevel::amx:
            return "amx";
    }
    return "";
}

bool compiled(IsaLevel level) {
#define XSMOE_IS(name) || level == IsaLevel::name
    return false XSMOE_ISA_LEVELS(XSMOE_IS);
#undef XSMOE_IS
}

bool supported(IsaLevel level) {
    const Features& has = features();
    switch (level) {
        case IsaLevel::baseline:
            return true;
        case IsaLevel::avx2:
            return has.avx2 && has.fma;
        case IsaLevel::avx512:
            return supported(IsaLevel::avx2) && has.avx512f && has.avx512bw && has.avx512dq && has.avx512vl;
        case IsaLevel::avx512_bf16:
            return supported(IsaLevel::avx512) && has.avx512_bf16;
        case IsaLevel::amx:
#ifdef XSMOE_EMULATE_AMX
            return supported(IsaLevel::avx512_bf16);
#else
            return supported(IsaLevel::avx512_bf16) && has.amx_tile && has.amx_bf16;
#endif
    }
    return false;
}

IsaLevel isa_level() {
    // An exception leaves `chosen` uninitialized, so that every later call throws too.
    static const IsaLevel chosen = choose();
    return chosen;
}

std::vector<std::string> cpu_features() {
    const Features& has = features();
    const std::pair<const char*, bool> named[] = {
        {"avx2", has.avx2},
        {"fma", has.fma},
        {"avx512f", has.avx512f},
        {"avx512bw", has.avx512bw},
        {"avx512dq", has.avx512dq},
        {"avx512vl", has.avx512vl},
        {"avx512_bf16", has.avx512_bf16},
        {"amx_tile", has.amx_tile},
        {"amx_bf16", has.amx_bf16},
    };
    std::vector<std::string> present;
    for (const auto& [feature, found] : named) {
        if (found) {
            present.emplace_back(feature);
        }
    }
    return present;
}

}  // namespace xsmoe
