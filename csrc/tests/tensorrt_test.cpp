// Tests the checks, bindings, aliases and releases of the tensorrt plugin over the stand-in of tests/stand_in.
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "check.h"
#include "greedy/plugin.h"

namespace {

const std::int64_t kShape[] = {2, 3};
const float kWeight[6] = {};

std::string write(const std::string& text) {
    const std::string path = (std::filesystem::temp_directory_path() / "greedy_stand_in.plan").string();
    std::ofstream(path) << text;
    return path;
}

int open_status(const char* target, const char* version) {
    const greedy_device_settings settings{target, version, nullptr, 2, nullptr, nullptr};
    char error[256] = "";
    void* device = nullptr;
    const int status = greedy_plugin_get()->open(&settings, &device, error, sizeof error);
    if (device) greedy_plugin_get()->close(device);
    return status;
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
    check(plugin.version == GREEDY_PLUGIN_VERSION && !std::strcmp(plugin.name, "tensorrt"), "plugin: name and version");
    check(open_status("cuda-sm90", "11.0.0.99") == GREEDY_OK, "open: this GPU and version");
    check(open_status("cuda-sm89", "11.0.0.99") == GREEDY_NO_BACKEND, "open: another GPU");
    check(open_status("cuda-sm90", "10.9.0") == GREEDY_NO_BACKEND, "open: another version");
    check(open_status("cuda-sm90", nullptr) == GREEDY_NO_BACKEND, "open: no version");

    const greedy_device_settings settings{"cuda-sm90", "11.0.0", nullptr, 2, nullptr, nullptr};
    char error[256] = "";
    void *device = nullptr, *graph = nullptr;
    check(plugin.open(&settings, &device, error, sizeof error) == GREEDY_OK, "open: again");
    const std::string good = "in x 0 6\nin k_0 0 6\nout y 0 6\nout k_0_out 0 6 k_0\n";
    for (const char* bad : {"in x 0 6\nin k_0 0 6\nout y 0 6\nout k_0_out 0 6\n",
                            "in x 0 5\nin k_0 0 6\nout y 0 6\nout k_0_out 0 6 k_0\n",
                            "in x 1 6\nin k_0 0 6\nout y 0 6\nout k_0_out 0 6 k_0\n",
                            "in x 0 6\nout k_0 0 6\nout y 0 6\nout k_0_out 0 6 k_0\n",
                            "in x 0 6\nin k_0 0 6\nin z 0 6\nout y 0 6\nout k_0_out 0 6 k_0\n"})
        check(load_status(device, bad, &graph) == GREEDY_BAD_BUNDLE, std::string("load: accepted\n") + bad);
    check(load_status(device, good + "weight v\n", &graph, true) == GREEDY_BAD_BUNDLE,
          "load: a weight of another name");
    check(load_status(device, good + "weight w\n", &graph, true) == GREEDY_OK, "load: with a weight");
    plugin.unload(device, graph);
    check(load_status(device, good, &graph, false, "vae_steady") == GREEDY_BAD_BUNDLE,
          "load: a cache of a VAE in place");
    check(load_status(device, good, &graph) == GREEDY_OK, "load: a good plan");

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
