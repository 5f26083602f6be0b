// The C boundary of every plugin.
#pragma once

#include <cstdio>
#include <new>

#include "base/error.h"

namespace greedy::plugin {

using Failure = core::Error;

// Runs `work`; returns an exception as a status and writes its line to `error`.
template <typename Work>
int guarded(char* error, size_t size, Work&& work) noexcept {
    int status = GREEDY_OK;
    try {
        try {
            work();
            return GREEDY_OK;
        } catch (const Failure& failure) {
            status = failure.status;
            std::snprintf(error, size, "%s", failure.what());
        } catch (const std::bad_alloc&) {
            status = GREEDY_NO_MEMORY;
            std::snprintf(error, size, "out of memory");
        } catch (const std::exception& failure) {
            status = GREEDY_FAILED;
            std::snprintf(error, size, "%s", failure.what());
        }
    } catch (...) {
        status = GREEDY_FAILED;
        std::snprintf(error, size, "unknown failure");
    }
    return status;
}

}  // namespace greedy::plugin
