#include "core/families.h"

#include "base/table.h"

namespace greedy::core {

extern const Family greedy_family;  // greedy.cpp
extern const Family causal_family;  // causal.cpp

namespace {

const struct {
    const char* name;
    const Family* family;
} kFamilies[] = {
    {"greedy", &greedy_family},
    {"causal", &causal_family},
};

}  // namespace

const Family& find_family(const std::string& name, const std::string& where) {
    return *find_row(kFamilies, name, where).family;
}

}  // namespace greedy::core
