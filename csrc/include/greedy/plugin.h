/* What an execution plugin gives the core: buffers on a device, and compiled graphs that run on them.
 *
 * A plugin is a shared library libgreedy_<backend>.so that exports greedy_plugin_get. It links nothing of the core.
 * Functions return GREEDY_OK or a negative greedy_status with one line in `error` (always terminated). All of them may
 * be called by several threads at once on one device; a graph runs for as many callers at once as `parallel` says.
 */
#ifndef GREEDY_PLUGIN_H
#define GREEDY_PLUGIN_H

#include "greedy/greedy.h"

#define GREEDY_PLUGIN_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

enum greedy_dtype { GREEDY_FLOAT32 = 0, GREEDY_FLOAT16, GREEDY_BFLOAT16, GREEDY_FLOAT8_E4M3FN, GREEDY_INT64 };

/* Shape and type of one input, output or constant; tensors are contiguous. */
typedef struct greedy_tensor {
    const char *name;
    int32_t dtype;
    int32_t rank;
    const int64_t *shape;
} greedy_tensor;

/* A weight in host memory that stays valid, and the same, until the device is closed. */
typedef struct greedy_constant {
    greedy_tensor tensor; /* its name is the graph's own */
    const void *data;
} greedy_constant;

typedef struct greedy_graph_spec {
    const char *name, *file; /* the stage; the path of the compiled graph */
    const greedy_tensor *inputs, *outputs;
    size_t input_count, output_count;
    const greedy_constant *constants;
    size_t constant_count;
    const int32_t *aliases; /* for every output: the input in whose memory it is written, or -1 */
} greedy_graph_spec;

/* Device memory; `owner` is the plugin's, NULL where the memory is an input's. Offsets into `data` may be passed
   wherever an input is. */
typedef struct greedy_buffer {
    void *data, *owner;
} greedy_buffer;

typedef struct greedy_device_settings {
    const char *target;      /* of the manifest: cpu-x86_64-avx2, cuda-sm90, ... */
    const char *version;     /* of the library that compiled the graphs, as the manifest has it, or NULL */
    const char *library_dir; /* NULL: the environment, then beside the plugin, then the system's search path */
    int parallel;
    greedy_log_callback log;
    void *log_cookie;
} greedy_device_settings;

typedef struct greedy_plugin {
    uint32_t version; /* GREEDY_PLUGIN_VERSION */
    const char *name; /* of the backend */
    int (*open)(const greedy_device_settings *settings, void **device, char *error, size_t size);
    void (*close)(void *device); /* after all its graphs and buffers are gone */
    int (*load)(void *device, const greedy_graph_spec *spec, void **graph, char *error, size_t size);
    void (*unload)(void *device, void *graph);
    int (*allocate)(void *device, size_t bytes, greedy_buffer *buffer, char *error, size_t size); /* zeroed */
    void (*release)(void *device, greedy_buffer buffer);
    /* Copies of bytes; when one returns, `from` may be reused. */
    int (*upload)(void *device, void *to, const void *from, size_t bytes, char *error, size_t size);
    int (*download)(void *device, void *to, const void *from, size_t bytes, char *error, size_t size);
    int (*copy)(void *device, void *to, const void *from, size_t bytes, char *error, size_t size);
    /* inputs in the order of the spec; on success every output is a new buffer of the caller's. */
    int (*run)(void *device, void *graph, void *const *inputs, greedy_buffer *outputs, char *error, size_t size);
} greedy_plugin;

GREEDY_API const greedy_plugin *greedy_plugin_get(void);

#ifdef __cplusplus
}
#endif
#endif
