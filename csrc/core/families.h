// The families of generators, as engine/generators. To add one, write its file beside greedy.cpp and causal.cpp, and
// add a row to families.cpp.
#pragma once

#include <memory>
#include <string>

#include "core/generator.h"
#include "formats/config.h"
#include "runtime/stages.h"

namespace greedy::core {

struct Family {
    // Throws Error(GREEDY_BAD_BUNDLE) where a preset is outside the family's limits.
    void (*check)(const Preset& preset, const std::string& where);
    // Its kinds of pass, and the cache of every role.
    Layout (*layout)(const Preset& preset);
    // A stream's generator; set_text comes before any other call. `stages` must outlive it.
    std::unique_ptr<Generator> (*make)(Stages& stages);
};

// The family that a preset names. Throws Error(GREEDY_BAD_BUNDLE) where there is no such family.
const Family& find_family(const std::string& name, const std::string& where);

}  // namespace greedy::core
