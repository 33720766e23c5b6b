// The library xsmoe_cuda: functions that belong to no operator. Operators add their own in csrc/<operator>/cuda.cpp.

#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda_facts.h"

namespace {

std::string build() { return cuda_facts::json; }

}  // namespace

STABLE_TORCH_LIBRARY(xsmoe_cuda, m) { m.def("build() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(xsmoe_cuda, CompositeExplicitAutograd, m) { m.impl("build", TORCH_BOX(&build)); }
