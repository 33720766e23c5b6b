// A Python module of facts about the build that it belongs to, and about this processor. No operator lives here.

#include <pybind11/pybind11.h>

#include "cpu/features.h"
#include "facts.h"  // written by setup.py

namespace {

pybind11::list supported_tiers() {
    pybind11::list names;
    for (xsmoe::IsaLevel level : xsmoe::all_isa_levels) {
        if (xsmoe::compiled(level) && xsmoe::supported(level)) {
            names.append(xsmoe::name(level));
        }
    }
    return names;
}

pybind11::list cpu_features() {
    pybind11::list names;
    for (const std::string& feature : xsmoe::cpu_features()) {
        names.append(feature);
    }
    return names;
}

}  // namespace

PYBIND11_MODULE(_build_facts, m) {
    m.doc() = "What the native library beside this module was built with, and what this processor has.";
    m.def("build", [] { return facts::json; }, "Compiler, flags, torch and tiers of the build, as JSON.");
    m.def("supported_tiers", supported_tiers, "The compiled tiers that run on this processor, worst first.");
    m.def("cpu_features", cpu_features, "What this processor has of all that any tier asks for.");
}
