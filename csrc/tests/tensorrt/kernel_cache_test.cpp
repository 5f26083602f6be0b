// Tests where the tensorrt_rtx plugin keeps compiled kernels, over the stand-in of tests/stand_in.
#include "kernel_cache.h"

#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "../check.h"
#include "NvInfer.h"
#include "greedy/plugin.h"

namespace {
namespace fs = std::filesystem;

const std::int64_t kShape[] = {2, 3};
const fs::path kFolder = fs::temp_directory_path() / ("greedy_kernels." + std::to_string(getpid()));

// What one start of a program does: opens the plugin, loads a plan with one output; returns the compiled kernels.
struct Start {
    int compiled = 0;
    std::vector<std::string> said;
};
Start start(const std::string& output = "y") {
    Start out;
    const auto keep = [](void* cookie, int, const char* text) { static_cast<Start*>(cookie)->said.emplace_back(text); };
    const greedy_device_settings settings{"cuda-sm90", "1.7.1", nullptr, 2, keep, &out};
    const std::string plan = (kFolder / (std::to_string(getpid()) + ".plan")).string();
    std::ofstream(plan) << "in x 0 6\nout " << output << " 0 6\n";
    const greedy_tensor input{"x", GREEDY_FLOAT32, 2, kShape}, made{output.c_str(), GREEDY_FLOAT32, 2, kShape};
    const std::int32_t alias = -1;
    const greedy_graph_spec spec{"sdd", plan.c_str(), &input, &made, 1, 1, nullptr, 0, &alias};
    const greedy_plugin& plugin = *greedy_plugin_get();
    char error[256] = "";
    void *device = nullptr, *graph = nullptr;
    stand_in_compiled = 0;
    check(plugin.open(&settings, &device, error, sizeof error) == GREEDY_OK, error);
    check(plugin.load(device, &spec, &graph, error, sizeof error) == GREEDY_OK, error);
    if (graph) plugin.unload(device, graph);
    plugin.close(device);
    out.compiled = stand_in_compiled;
    return out;
}

std::vector<fs::path> kept() {
    std::vector<fs::path> out;
    for (const auto& entry : fs::directory_iterator(kFolder / "cache/tensorrt_rtx")) out.push_back(entry.path());
    return out;
}

std::string content(const fs::path& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
}

void test_folders() {
    const auto folder_with = [](const char* cache, const char* xdg, const char* home) {
        for (const auto& [name, value] : {std::pair("GREEDY_CACHE", cache), {"XDG_CACHE_HOME", xdg}, {"HOME", home}})
            value ? setenv(name, value, 1) : unsetenv(name);
        return greedy::plugin::cache_folder();
    };
    check(folder_with("/c", "/x", "/h") == "/c", "folder: GREEDY_CACHE");
    check(folder_with("", "/x", "/h").empty(), "folder: an empty GREEDY_CACHE");
    check(folder_with(nullptr, "/x", "/h") == "/x/greedy-stream", "folder: XDG_CACHE_HOME");
    check(folder_with(nullptr, nullptr, "/h") == "/h/.cache/greedy-stream", "folder: HOME");
    check(folder_with(nullptr, "", "/h") == "/h/.cache/greedy-stream", "folder: an empty XDG_CACHE_HOME");
    check(folder_with(nullptr, "x", "/h") == "/h/.cache/greedy-stream", "folder: a relative XDG_CACHE_HOME");
    check(folder_with(nullptr, nullptr, "").empty() && folder_with(nullptr, nullptr, nullptr).empty(), "folder: none");
}

void test_damaged(const std::string& whole) {
    const fs::path file = kept().front();
    for (const std::string& damaged : {std::string(), std::string("no kernels"), std::string(1 << 16, '\0')}) {
        std::ofstream(file) << damaged;
        const Start again = start();
        check(again.compiled == 1 && again.said.size() == 1, "damaged: compiled and said");
        check(content(file) == whole && start().compiled == 0, "damaged: replaced");
    }
    fs::remove(file);
    fs::create_symlink(kFolder / (std::to_string(getpid()) + ".plan"), file);
    check(start().said.size() == 1 && !fs::is_symlink(file) && content(file) == whole,
          "damaged: a link is not followed");
    fs::remove(file);
    fs::create_directory(file);
    check(start().said.size() == 2, "damaged: a directory in its place is said when read and when written");
    fs::remove(file);
}

// Programs that start together write one whole file.
void test_together() {
    std::vector<pid_t> children;
    for (int i = 0; i < 8; ++i)
        if (children.push_back(fork()); children.back() == 0) {
            start();
            _exit(failures);
        }
    for (const pid_t child : children) {
        int status = -1;
        check(waitpid(child, &status, 0) == child && status == 0, "together: a program that fails");
    }
    check(kept().size() == 1 && content(kept().front()) == "kernels y", "together: one whole file");
}

}  // namespace

int main() {
    fs::create_directories(kFolder);
    test_folders();
    setenv("GREEDY_CACHE", (kFolder / "cache").c_str(), 1);

    const Start first = start();
    check(first.compiled == 1 && first.said.empty(), "first start: two contexts, one kernel");
    check(kept().size() == 1 && content(kept().front()) == "kernels y", "first start: one file, the kernels");
    check(kept().front().filename() == "36c0dd977f12a14b2c1861e5c4e6aa5e-19.kernels",
          "first start: the name that engine/bundles/tensorrt_rtx.py gives this plan");
    struct stat info;
    check(stat(kept().front().c_str(), &info) == 0 && (info.st_mode & 0777) == 0600, "first start: a private file");
    check(start().compiled == 0, "second start: nothing is compiled");
    const auto when = fs::last_write_time(kept().front());
    check(start().compiled == 0 && fs::last_write_time(kept().front()) == when, "second start: nothing is written");
    check(start("z").compiled == 1 && start("z").compiled == 0 && start().compiled == 0, "another plan: its own file");
    check(kept().size() == 2, "another plan: two files");
    fs::remove_all(kFolder / "cache");

    start();
    const fs::path part = kept().front().string() + ".part";
    std::ofstream(part) << "cut off";  // as a killed writer leaves it
    std::ofstream(kept().front() == part ? kept().back() : kept().front()) << "no kernels";
    start();
    check(kept().size() == 1 && start().compiled == 0, "a cut file of another writer is used up");
    test_damaged("kernels y");
    fs::remove_all(kFolder / "cache");
    test_together();

    fs::remove_all(kFolder / "cache");
    std::ofstream(kFolder / "cache") << "a file";
    const Start blocked = start();
    check(blocked.compiled == 1 && !blocked.said.empty(), "no place: it runs and says so");
    check(blocked.said.front().find("expected a place to keep compiled kernels") != std::string::npos,
          "no place: text");
    check(content(kFolder / "cache") == "a file", "no place: nothing is overwritten");
    setenv("GREEDY_CACHE", "", 1);
    check(start().compiled == 2 && start().said.empty(), "switched off: each context compiles");
    fs::remove_all(kFolder);
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
