// The library xsmoe_native: functions that belong to no operator. Operators add their own in csrc/<operator>/cpu.cpp.

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cpu/features.h"

namespace {

std::string cpu_tier() { return xsmoe::name(xsmoe::isa_level()); }

std::vector<std::string> supported_tiers() {
    std::vector<std::string> names;
    for (xsmoe::IsaLevel level : xsmoe::all_isa_levels) {
        if (xsmoe::compiled(level) && xsmoe::supported(level)) {
            names.emplace_back(xsmoe::name(level));
        }
    }
    return names;
}

}  // namespace

STABLE_TORCH_LIBRARY(xsmoe_native, m) {
    m.def("cpu_tier() -> str");
    m.def("supported_tiers() -> str[]");
    m.def("cpu_features() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(xsmoe_native, CompositeExplicitAutograd, m) {
    m.impl("cpu_tier", TORCH_BOX(&cpu_tier));
    m.impl("supported_tiers", TORCH_BOX(&supported_tiers));
    m.impl("cpu_features", TORCH_BOX(&xsmoe::cpu_features));
}
