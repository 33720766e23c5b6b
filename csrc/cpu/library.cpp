// The library xsmoe_native: functions that belong to no operator. Operators add theirs in csrc/<operator>/cpu.cpp.

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cpu/features.h"

namespace {

std::string cpu_tier() { return xsmoe::name(xsmoe::tier()); }

std::vector<std::string> supported_tiers() {
    std::vector<std::string> names;
    for (xsmoe::Tier tier : xsmoe::all_tiers) {
        if (xsmoe::compiled(tier) && xsmoe::supported(tier)) {
            names.emplace_back(xsmoe::name(tier));
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
