// Random calls of the C interface, right and wrong, on a few sessions at once.
#pragma once

#include <string>

// Every two bytes are a call. Aborts with a line unless each call has the status that a plain model of a session gives
// it, and a fresh session that gets only the calls that succeeded makes the same frames. The bundle of formulas and its
// plugin are GREEDY_FAKE_BUNDLE (or the environment variable of that name) and GREEDY_FAKE_PLUGIN_DIR.
void play_calls(const std::string& bytes);
