// The features of this processor, and the instruction set level that the kernels use.
//
// An instruction set level is one choice of instruction sets, for which all kernels are compiled once. The build
// defines XSMOE_ISA_LEVELS(X). It expands to X(level) for every compiled level, the slowest first:
//
//     switch (isa_level()) {
//     #define XSMOE_CASE(name) case IsaLevel::name: return name::forward(...);
//         XSMOE_ISA_LEVELS(XSMOE_CASE)
//     }
#pragma once

#include <string>
#include <vector>

namespace xsmoe {

enum class IsaLevel { baseline, avx2, avx512, avx512_bf16, amx };

inline constexpr IsaLevel all_isa_levels[] = {
    IsaLevel::baseline, IsaLevel::avx2, IsaLevel::avx512, IsaLevel::avx512_bf16, IsaLevel::amx,
};

const char* name(IsaLevel level);

// Return whether this binary contains the kernels of a level.
bool compiled(IsaLevel level);

// Return whether the processor and the operating system support a level. With XSMOE_EMULATE_AMX, which is for tests,
// the level amx is supported wherever avx512_bf16 is: cpu/amx.h emulates the tiles.
bool supported(IsaLevel level);

// Return the level in use: the one that XSMOE_CPU_TIER names, else the fastest that is compiled and supported. The
// first call decides. Throws std::runtime_error if XSMOE_CPU_TIER names a level that cannot run.
IsaLevel isa_level();

// Return those features of the processor that any level needs, by their names in /proc/cpuinfo.
std::vector<std::string> cpu_features();

}  // namespace xsmoe
