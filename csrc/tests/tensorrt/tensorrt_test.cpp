// Tests the checks, bindings, aliases and releases of the tensorrt and tensorrt_rtx plugins over the stand-in of
// tests/stand_in. The program is built for each of them.
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "../check.h"
#include "NvInfer.h"
#include "greedy/plugin.h"

namespace {

const std::int64_t kShape[] = {2, 3};
const float kWeight[6] = {};
#ifdef GREEDY_TENSORRT_RTX
const char *const kName = "tensorrt_rtx", *const kVersion = "1.7.1.116", *const kOther = "1.6.1.120";
const std::int32_t kOtherLibrary = 10800;
#else
const char *const kName = "tensorrt", *const kVersion = "11.0.0.99", *const kOther = "10.9.0";
const std::int32_t kOtherLibrary = 120000;
#endif

std::string write(const std::string& text) {
    const std::string path = (std::filesystem::temp_directory_path() / "greedy_stand_in.plan").string();
    std::ofstream(path) << text;
    return path;
}

int open_status(const char* target, const char* version, std::string* why = nullptr) {
    const greedy_device_settings settings{target, version, nullptr, 2, nullptr, nullptr};
    char error[256] = "";
    void* device = nullptr;
    const int status = greedy_plugin_get()->open(&settings, &device, error, sizeof error);
    if (device) greedy_plugin_get()->close(device);
    if (why) *why = error;
    return status;
}

void test_gpus() {
    struct Case {
        int gpu;
        const char* target;
        bool runs;
    };
    for (const Case& one : {Case{89, "cuda-sm89", true},
                            {80, "cuda-sm80_sm86_sm89_sm120_sm121", true},
                            {89, "cuda-sm80_sm86_sm89_sm120_sm121", true},
                            {121, "cuda-sm80_sm86_sm89_sm120_sm121", true},
                            {90, "cuda-sm80_sm86_sm89_sm120_sm121", false},
                            {87, "cuda-sm80_sm86", false},
                            {120, "cuda-sm12_sm121", false},
                            {12, "cuda-sm120_sm121", false},
                            {86, "cuda-sm860_sm8", false},
                            {86, "cuda-86", false},
                            {86, "cuda", false},
                            {86, "cuda-", false},
                            {86, "", false},
                            {86, "cpu-sm86", false},
                            {86, "sm86", false},
                            {86, "cuda-sm80-sm86", false}}) {
        stand_in_gpu = one.gpu;
        std::string why;
        const int status = open_status(one.target, kVersion, &why);
        const std::string here = "cuda-sm" + std::to_string(one.gpu);
        check(status == (one.runs ? GREEDY_OK : GREEDY_NO_BACKEND), "gpu: " + here + " with " + one.target);
        check(one.runs || why == std::string("got plans for ") + one.target + ", expected " + here, "gpu: " + why);
    }
    stand_in_gpu = 0;
    std::string why;
    check(open_status("cuda-sm89", kVersion, &why) == GREEDY_NO_BACKEND, "gpu: none");
    check(why == "got no GPU (an error of the stand-in), expected one", "gpu: " + why);
    stand_in_gpu = 90;
}

// Loads a plan of this text as a graph with x, k_0 -> y, k_0_out; returns the status.
int load_status(void* device, const std::string& plan, void** graph, bool weight = false, const char* name = "sdd") {
    const std::string path = write(plan);
    const greedy_tensor inputs[] = {{"x", GREEDY_FLOAT32, 2, kShape}, {"k_0", GREEDY_FLOAT32, 2, kShape}};
    const greedy_tensor outputs[] = {{"y", GREEDY_FLOAT32, 2, kShape}, {"k_0_out", GREEDY_FLOAT32, 2, kShape}};
    const greedy_constant constant{{"w", GREEDY_FLOAT32, 2, kShape}, kWeight};
    const std::int32_t aliases[] = {-1, 1};
    const greedy_graph_spec spec{name,   path.c_str(), inputs, outputs, 2, 2, weight ? &constant : nullptr,
                                 weight, aliases};
    char error[256] = "";
    return greedy_plugin_get()->load(device, &spec, graph, error, sizeof error);
}

}  // namespace

int main() {
    const greedy_plugin& plugin = *greedy_plugin_get();
    check(plugin.version == GREEDY_PLUGIN_VERSION && !std::strcmp(plugin.name, kName), "plugin: name and version");
    check(open_status("cuda-sm90", kVersion) == GREEDY_OK, "open: this GPU and version");
    check(open_status("cuda-sm89", kVersion) == GREEDY_NO_BACKEND, "open: another GPU");
    check(open_status("cuda-sm90", kOther) == GREEDY_NO_BACKEND, "open: another version");
    check(open_status("cuda-sm90", nullptr) == GREEDY_NO_BACKEND, "open: no version");
    const std::int32_t library = std::exchange(stand_in_library, kOtherLibrary);
    check(open_status("cuda-sm90", kVersion) == GREEDY_NO_BACKEND, "open: another library");
#ifdef GREEDY_TENSORRT_RTX  // whose slots are those of one version
    check(open_status("cuda-sm90", "1.8.0.1") == GREEDY_NO_BACKEND,
          "open: a library that the plugin was not built for");
#endif
    stand_in_library = library;
    test_gpus();

    const greedy_device_settings settings{"cuda-sm90", kVersion, nullptr, 2, nullptr, nullptr};
    char error[256] = "";
    void *device = nullptr, *graph = nullptr;
    check(plugin.open(&settings, &device, error, sizeof error) == GREEDY_OK, "open: again");
    const std::string good = "in x 0 6\nin k_0 0 6\nout y 0 6\nout k_0_out 0 6 k_0\n";
    for (const char* bad : {"in x 0 6\nin k_0 0 6\nout y 0 6\nout k_0_out 0 6\n",
                            "in x 0 5\nin k_0 0 6\nout y 0 6\nout k_0_out 0 6 k_0\n",
                            "in x 1 6\nin k_0 0 6\nout y 0 6\nout k_0_out 0 6 k_0\n",
                            "in x 0 6\nout k_0 0 6\nout y 0 6\nout k_0_out 0 6 k_0\n",
                            "in x 0 6\nin k_0 0 6\nin z 0 6\nout y 0 6\nout k_0_out 0 6 k_0\n",
                            "in x 0 6\nin k_0 0 6\nin unread_0 0 6\nout y 0 6\nout k_0_out 0 6 k_0\n",
                            "in x 0 6\nin k_0 0 6\nout y 0 6\nout k_0_out 0 6 k_0\nout read_0 0 6\n"})
        check(load_status(device, bad, &graph) == GREEDY_BAD_BUNDLE, std::string("load: accepted\n") + bad);
    check(load_status(device, good + "weight v\n", &graph, true) == GREEDY_BAD_BUNDLE,
          "load: a weight of another name");
    check(load_status(device, good + "weight w\n", &graph, true) == GREEDY_OK, "load: with a weight");
    plugin.unload(device, graph);
    check(load_status(device, good, &graph, false, "vae_steady") == GREEDY_BAD_BUNDLE,
          "load: a cache of a VAE in place");
    // The run below fails unless outputs that only the plan has are bound to memory.
    check(load_status(device, good + "out unread_0 7 9\nout unread_1 0 4\n", &graph) == GREEDY_OK, "load: a good plan");

    greedy_buffer x, cache, outputs[2];
    check(plugin.allocate(device, 24, &x, error, sizeof error) == GREEDY_OK, "memory: x");
    check(plugin.allocate(device, 24, &cache, error, sizeof error) == GREEDY_OK, "memory: cache");
    void* inputs[] = {x.data, cache.data};
    for (int i = 1; i < 4; ++i) {
        check(plugin.run(device, graph, inputs, outputs, error, sizeof error) == GREEDY_OK, "run");
        float y = 0, kept = 0;
        plugin.download(device, &y, outputs[0].data, sizeof y, error, sizeof error);
        plugin.download(device, &kept, cache.data, sizeof kept, error, sizeof error);
        check(y == 1 && kept == static_cast<float>(i), "run: a new output, and a cache in place");
        check(outputs[1].data == cache.data && !outputs[1].owner, "run: an alias is the input's memory");
        for (const greedy_buffer& output : outputs) plugin.release(device, output);
    }
    plugin.unload(device, graph);
    plugin.release(device, x);
    plugin.release(device, cache);
    plugin.close(device);
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
