// The prompts of a command line and of a file, checked and in order of time. The same as engine/commands/prompts.py.
#pragma once

#include <csignal>
#include <cstdint>
#include <string>
#include <vector>

#include "greedy/greedy.hpp"
#include "host/options.h"

namespace greedy::host {

// A text, the frame from which it is asked for, and the option that gave it.
struct Prompt {
    std::uint64_t frame;
    std::string text, where;
    Session::Texts blend = {};  // texts that are mixed into it, with their weights beside its own of 1

    // What a session is told.
    Session::Texts asked() const;
};

// A signal has ended the wait for stdin.
struct Stopped {};

// By frame; of several at one frame the last one given comes last. Throws StatusError (got and expected) for no text, a
// time past the end, or a file that holds no text.
std::vector<Prompt> prompts_of(const Options& options, double fps, const volatile std::sig_atomic_t& stopped);

}  // namespace greedy::host
