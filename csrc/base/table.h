// Tables of named rows: families, solvers, commit policies.
#pragma once

#include <cstddef>
#include <string>

#include "base/error.h"

namespace greedy::core {

// The row with this name. Throws Error(GREEDY_BAD_BUNDLE) with all names where there is none.
template <typename Row, std::size_t N>
const Row& find_row(const Row (&rows)[N], const std::string& name, const std::string& where) {
    std::string names;
    for (const Row& row : rows) {
        if (name == row.name) return row;
        names += (names.empty() ? "" : ", ") + std::string(row.name);
    }
    fail(GREEDY_BAD_BUNDLE, where, "'" + name.substr(0, 60) + "'", "one of " + names);
}

}  // namespace greedy::core
