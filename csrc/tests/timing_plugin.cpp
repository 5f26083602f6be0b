// The aoti plugin with a clock around every graph, built as libgreedy_aoti.so in a directory below the real one.
// Closing the device logs the number of runs and their time; the rest of a stream's time is the core's.
#include <dlfcn.h>
#include <time.h>

#include <cstdio>
#include <string>

#include "greedy/plugin.h"

namespace {

const greedy_plugin* real = nullptr;

struct Timed {
    void* device;
    greedy_log_callback log;
    void* cookie;
    long runs = 0;  // for one session at a time
    double begun = 0, ms = 0;
};

double now() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return 1e3 * static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_nsec);
}

Timed& of(void* device) { return *static_cast<Timed*>(device); }

bool load_real() {
    Dl_info info;
    if (real || !dladdr(reinterpret_cast<const void*>(&greedy_plugin_get), &info)) return real != nullptr;
    const std::string path = info.dli_fname;
    void* library = dlopen((path.substr(0, path.rfind('/')) + "/../libgreedy_aoti.so").c_str(), RTLD_NOW | RTLD_LOCAL);
    const auto get =
        reinterpret_cast<const greedy_plugin* (*)()>(library ? dlsym(library, "greedy_plugin_get") : nullptr);
    real = get ? get() : nullptr;
    return real != nullptr;
}

int open_device(const greedy_device_settings* settings, void** device, char* error, size_t size) {
    if (!load_real())
        return std::snprintf(error, size, "got no libgreedy_aoti.so above, expected it"), GREEDY_NO_BACKEND;
    auto* timed = new Timed{nullptr, settings->log, settings->log_cookie};
    const int status = real->open(settings, &timed->device, error, size);
    if (status < 0)
        delete timed;
    else
        *device = timed;
    return status;
}

void close_device(void* device) {
    Timed& timed = of(device);
    char text[120];
    std::snprintf(text, sizeof text, "graphs: %ld runs, %.3f of %.3f ms", timed.runs, timed.ms, now() - timed.begun);
    if (timed.log) timed.log(timed.cookie, GREEDY_LOG_INFO, text);
    real->close(timed.device);
    delete &timed;
}

int load(void* device, const greedy_graph_spec* spec, void** graph, char* error, size_t size) {
    return real->load(of(device).device, spec, graph, error, size);
}
void unload(void* device, void* graph) { real->unload(of(device).device, graph); }
int allocate(void* device, size_t bytes, greedy_buffer* buffer, char* error, size_t size) {
    return real->allocate(of(device).device, bytes, buffer, error, size);
}
void release(void* device, greedy_buffer buffer) { real->release(of(device).device, buffer); }
int upload(void* device, void* to, const void* from, size_t bytes, char* error, size_t size) {
    return real->upload(of(device).device, to, from, bytes, error, size);
}
int download(void* device, void* to, const void* from, size_t bytes, char* error, size_t size) {
    return real->download(of(device).device, to, from, bytes, error, size);
}

int run(void* device, void* graph, void* const* inputs, greedy_buffer* outputs, char* error, size_t size) {
    const double begun = now();
    if (of(device).runs == 0) of(device).begun = begun;
    const int status = real->run(of(device).device, graph, inputs, outputs, error, size);
    of(device).ms += now() - begun;
    ++of(device).runs;
    return status;
}

const greedy_plugin kPlugin = {GREEDY_PLUGIN_VERSION,
                               "aoti",
                               open_device,
                               close_device,
                               load,
                               unload,
                               allocate,
                               release,
                               upload,
                               download,
                               run};

}  // namespace

const greedy_plugin* greedy_plugin_get(void) { return &kPlugin; }
