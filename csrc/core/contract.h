// The graphs that a bundle must have, and the tensors that each of them takes and gives; as engine/bundles/contract.py.
#pragma once

#include <string>

#include "formats/manifest.h"
#include "runtime/stages.h"

namespace greedy::core {

// Compares every backend's graphs with what the loop feeds: they check nothing themselves. Throws
// Error(GREEDY_BAD_BUNDLE) that begins with `where` and the field.
void check_graphs(const Manifest& manifest, const Layout& layout, const std::string& where);

}  // namespace greedy::core
