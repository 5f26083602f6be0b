// Where frames go, for C++ programs: y4m, raw RGB, an ffmpeg process, a checksum, nowhere.
//
//     auto sink = greedy::open_sink("out.y4m", "", width, height, fps);
//     sink->write(frame->data);  // as often as there are frames
//     sink->close();
//
// Functions throw std::runtime_error ("what: got X, expected Y"). A sink belongs to one thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "greedy/greedy.h"

namespace greedy {

// The reader at the other end of standard output has gone: an ordinary way for a stream to end.
class GREEDY_API OutputClosed : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

class GREEDY_API FrameSink {
  public:
    // Without close before it, nothing that was written is kept.
    virtual ~FrameSink();
    // One RGB frame, tightly packed.
    virtual void write(const std::uint8_t* rgb) = 0;
    // The output whole under its name; without a frame there is none.
    virtual void close() = 0;
    // sha256 of all frames where the target was `checksum`, else empty; after close.
    virtual std::string digest() const { return {}; }
};

// `null` counts, `checksum` hashes, `-` is stdout in `format` ("y4m" if empty, or "rgb"); else the suffix decides:
// .y4m, .rgb, and what an ffmpeg in PATH writes: .mp4, .mkv, .webm, .mov. A file grows as `.<name>.part` beside its
// name. For OutputClosed to come the program must ignore SIGPIPE.
GREEDY_API std::unique_ptr<FrameSink> open_sink(const std::string& target, const std::string& format, int width,
                                                int height, double fps);

}  // namespace greedy
