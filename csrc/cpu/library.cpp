// The library xsmoe_native: functions that belong to no operator. Operators add their own in csrc/<operator>/cpu.cpp.

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/features.h"

namespace {

std::string cpu_tier() { return xsmoe::name(xsmoe::isa_level()); }

}  // namespace

STABLE_TORCH_LIBRARY(xsmoe_native, m) { m.def("cpu_tier() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(xsmoe_native, CompositeExplicitAutograd, m) { m.impl("cpu_tier", TORCH_BOX(&cpu_tier)); }
