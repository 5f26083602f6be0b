// Where greedy-host writes frames: y4m, raw RGB, an ffmpeg process, a checksum, nowhere.
//
//     auto sink = open_sink("out.y4m", "", width, height, fps);
//     sink->write(frame->data);  // for every frame
//     sink->close();
//
// Functions throw greedy::StatusError ("what: got X, expected Y"). A sink belongs to one thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace greedy::host {

// The reader at the other end of standard output has gone: an ordinary way for a stream to end.
class OutputClosed : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

class FrameSink {
  public:
    virtual ~FrameSink() = default;
    // One RGB frame, tightly packed.
    virtual void write(const std::uint8_t* rgb) = 0;
    // Gives the whole output its name. A stream without frames leaves no output.
    virtual void close() = 0;
    // After an error, of close as well: keeps what was made under a name that nothing has, and returns that name.
    // Empty if nothing that plays was made. Does not throw.
    virtual std::string abort() = 0;
    // sha256 of all frames where the target was `checksum`, else empty; after close.
    virtual std::string digest() const { return {}; }
    // What a user should know: something older was replaced, found or left as it was.
    const std::vector<std::string>& notes() const { return notes_; }

  protected:
    std::vector<std::string> notes_;
};

// `null` counts, `checksum` hashes, `-` is stdout in `format` ("y4m" if empty, or "rgb"). Any other target is a file,
// and its suffix, in any case, decides: .y4m, .rgb, or what an ffmpeg in PATH writes (.mp4, .mkv, .webm, .mov). A file grows beside its
// name (part.h). An mp4 or mov is fragmented while it grows and an ordinary file after close.
// OutputClosed is only thrown in a program that ignores SIGPIPE; one that ignores SIGXFSZ gets a StatusError for a file
// that is too large.
std::unique_ptr<FrameSink> open_sink(const std::string& target, const std::string& format, int width, int height,
                                     double fps);

}  // namespace greedy::host
