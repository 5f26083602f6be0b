/* An execution plugin gives the core buffers on a device, and compiled graphs that run on them.
 *
 * A plugin is a shared library libgreedy_<backend>.so that exports greedy_plugin_get. It links nothing of the core.
 * Functions return GREEDY_OK or a negative greedy_status with one line in `error` (always terminated). Several threads
 * may call them at once on one device; a graph runs for `parallel` callers at once.
 */
#ifndef GREEDY_PLUGIN_H
#define GREEDY_PLUGIN_H

#include "greedy/greedy.h"

#define GREEDY_PLUGIN_VERSION 2

#ifdef __cplusplus
extern "C" {
#endif

enum greedy_dtype { GREEDY_FLOAT32 = 0, GREEDY_FLOAT16, GREEDY_BFLOAT16, GREEDY_FLOAT8_E4M3FN, GREEDY_INT64 };

/* Shape and type of one input, output or constant. Tensors are contiguous. */
typedef struct greedy_tensor {
    const char *name;
    int32_t dtype;
    int32_t rank;
    const int64_t *shape;
} greedy_tensor;

/* A weight in host memory, valid and unchanged until the device is closed. */
typedef struct greedy_constant {
    greedy_tensor tensor; /* under the graph's own name */
    const void *data;
} greedy_constant;

typedef struct greedy_graph_spec {
    const char *name, *file; /* the graph's name in the manifest; the path of the compiled graph */
    const greedy_tensor *inputs, *outputs;
    size_t input_count, output_count;
    const greedy_constant *constants;
    size_t constant_count;
    const int32_t *aliases; /* per output: the input in whose memory it is written, or -1 */
} greedy_graph_spec;

/* Device memory. `owner` belongs to the plugin and is NULL for an input's memory. Inputs may be offsets into `data`. */
typedef struct greedy_buffer {
    void *data, *owner;
} greedy_buffer;

typedef struct greedy_device_settings {
    const char *target;      /* of the manifest: cpu-x86_64-avx2, cuda-sm90, ... */
    const char *version;     /* of the library that compiled the graphs, from the manifest, or NULL */
    const char *library_dir; /* as greedy_settings has it, or NULL */
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
    /* Copy bytes; after the call `from` may be reused. */
    int (*upload)(void *device, void *to, const void *from, size_t bytes, char *error, size_t size);
    int (*download)(void *device, void *to, const void *from, size_t bytes, char *error, size_t size);
    /* inputs are in the order of the spec; on success the caller owns every output as a new buffer. */
    int (*run)(void *device, void *graph, void *const *inputs, greedy_buffer *outputs, char *error, size_t size);
} greedy_plugin;

GREEDY_API const greedy_plugin *greedy_plugin_get(void);

#ifdef __cplusplus
}
#endif
#endif
