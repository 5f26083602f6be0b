// Tests the tensorrt_rtx plugin with the real library and the stand-in of CUDA's runtime. Without a GPU the library
// refuses every plan, and says at which check: so this tests the version, the logger, the runtime and its end, and how
// a plan is handed over. An argument is a plan that the library's builder made.
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

#include "../check.h"
#include "cuda_runtime_api.h"
#include "greedy/plugin.h"

namespace {

const std::int64_t kShape[] = {2, 3};

std::string said;  // by the library, one line for each message

bool says(const std::string& text) { return said.find(text) != std::string::npos; }

// Loads a plan as a graph x -> y; returns the status.
int load(const std::string& plan) {
    const auto log = [](void*, int, const char* text) { said += std::string(text) + "\n"; };
    const greedy_device_settings settings{"cuda-sm80_sm90", "1.7.1.116", nullptr, 1, log, nullptr};
    const greedy_tensor input{"x", GREEDY_FLOAT32, 2, kShape}, output{"y", GREEDY_FLOAT32, 2, kShape};
    const std::int32_t alias = -1;
    const greedy_graph_spec spec{"sdd", plan.c_str(), &input, &output, 1, 1, nullptr, 0, &alias};
    const greedy_plugin& plugin = *greedy_plugin_get();
    char error[512] = "";
    void *device = nullptr, *graph = nullptr;
    said.clear();
    const int opened = plugin.open(&settings, &device, error, sizeof error);
    check(opened == GREEDY_OK, std::string("open: ") + error);
    if (opened != GREEDY_OK) return opened;
    const int status = plugin.load(device, &spec, &graph, error, sizeof error);
    if (graph) plugin.unload(device, graph);
    plugin.close(device);
    return status;
}

}  // namespace

int main(int count, char** words) {
    const std::string path =
        (std::filesystem::temp_directory_path() / ("greedy_rtx." + std::to_string(getpid()))).string();
    for (const std::size_t size : {0, 1, 63}) {
        std::ofstream(path) << std::string(size, 'x');
        check(load(path) == GREEDY_NO_BACKEND, "a short plan");
        check(says(size ? "bufferSize >= minBufferSize" : "(blob) != nullptr"), "a short plan: " + said);
    }
    for (const std::size_t size : {64, 300, 100000}) {
        std::ofstream(path) << std::string(size, 'x');
        check(load(path) == GREEDY_NO_BACKEND, "no plan");
        check(says("magicTag == kEXPECTED_MAGIC_TAG"), "no plan: " + said);
    }
    std::filesystem::remove(path);
    if (count > 1) {
        check(load(words[1]) == GREEDY_NO_BACKEND, "a plan without a GPU");
        check(!says("magicTag") && !says("minBufferSize"), "a plan: its header is read: " + said);
        check(says("CUDA driver version is insufficient"), "a plan: the driver is missing: " + said);
    }
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
