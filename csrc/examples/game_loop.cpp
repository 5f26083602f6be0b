// game_loop BUNDLE [TICKS]: a program with a loop of its own, such as a game. A thread streams; the loop shows the
// newest picture and never waits for it. The prompt changes half-way, as if a key had been pressed.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <thread>

#include "greedy/greedy.hpp"

class Screen {
  public:
    Screen(const greedy::Bundle& bundle, std::uint64_t seed, const std::string& prompt) : session_(bundle, seed) {
        session_.set_prompt(prompt);
        thread_ = std::thread([this] { stream(); });
    }
    ~Screen() {
        closing_ = true;
        session_.cancel();  // closing then waits for one graph at most
        thread_.join();
    }

    // Both return at once and may be called from any thread.
    void key(const std::string& prompt) { session_.set_prompt(prompt); }
    std::optional<greedy::Frame> newest() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return newest_;
    }

  private:
    void stream() {
        try {
            while (!closing_) {
                greedy::Frame frame = session_.next_frame();
                const std::lock_guard<std::mutex> lock(mutex_);
                newest_ = std::move(frame);
            }
        } catch (const greedy::StatusError& error) {
            if (error.status != GREEDY_CANCELLED) std::fprintf(stderr, "%s\n", error.what());
        }
    }

    greedy::Session session_;
    std::atomic<bool> closing_{false};
    std::mutex mutex_;
    std::optional<greedy::Frame> newest_;
    std::thread thread_;
};

int main(int argc, char** argv) {
    if (argc < 2) return std::fprintf(stderr, "usage: game_loop BUNDLE [TICKS]\n"), 2;
    const int ticks = argc > 2 ? std::atoi(argv[2]) : 120;
    try {
        const greedy::Bundle bundle(argv[1]);
        Screen screen(bundle, 1, "a red circle moving right slowly on a gray background");
        for (int tick = 0; tick < ticks; ++tick) {
            if (tick == ticks / 2) screen.key("a blue square moving up quickly on a white background");
            if (const auto frame = screen.newest())  // a game would upload the texture here
                std::printf("tick %d shows frame %llu\n", tick, static_cast<unsigned long long>((*frame)->index));
            std::this_thread::sleep_for(std::chrono::milliseconds(16));
        }
        return 0;
    } catch (const greedy::StatusError& error) {
        return std::fprintf(stderr, "error: %s\n", error.what()), 1;
    }
}
