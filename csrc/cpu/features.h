// What this processor has, and the tier of instructions that the kernels use.
//
// The build defines XSMOE_TIERS(X), which expands to X(tier) for every tier that was compiled, worst first:
//
//     switch (tier()) {
//     #define XSMOE_CASE(name) case Tier::name: return name::forward(...);
//         XSMOE_TIERS(XSMOE_CASE)
//     }
#pragma once

#include <string>
#include <vector>

namespace xsmoe {

enum class Tier { baseline, avx2, avx512, avx512_bf16, amx };

inline constexpr Tier all_tiers[] = {Tier::baseline, Tier::avx2, Tier::avx512, Tier::avx512_bf16, Tier::amx};

const char* name(Tier tier);

// Whether this binary holds the kernels of a tier.
bool compiled(Tier tier);

// Whether processor and operating system let a tier run. With XSMOE_EMULATE_AMX, which is for tests, the amx tier runs
// wherever avx512_bf16 does, on tiles that cpu/amx.h emulates.
bool supported(Tier tier);

// The tier in use: what XSMOE_CPU_TIER names, else the fastest that is compiled and supported. Decided once.
// Throws std::runtime_error where XSMOE_CPU_TIER names none that can run.
Tier tier();

// What the processor has of all that any tier asks for, by the names of /proc/cpuinfo.
std::vector<std::string> cpu_features();

}  // namespace xsmoe
