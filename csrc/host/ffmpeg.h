// Videos that an ffmpeg in PATH writes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "host/sinks.h"

namespace greedy::host {

// mp4, mkv, webm or mov.
bool is_video(const std::string& kind);
// A handler of signals. The first call gives the ffmpeg that runs a second to end; then it is asked to end, and a second
// later it is killed. Further calls are further steps. The handler of SIGALRM must be the same.
void urge_ffmpeg(int number);
// The nearest fraction with a denominator of at most 1001 (broadcast rates are n/1001), by continued fractions.
std::pair<std::int64_t, std::int64_t> fraction(double value);
// asked: the file's name as the user gave it. Throws StatusError without an ffmpeg, or for a size that it cannot code.
std::unique_ptr<FrameSink> open_ffmpeg(const std::string& asked, const std::string& kind, int width, int height,
                                       double fps);

}  // namespace greedy::host
