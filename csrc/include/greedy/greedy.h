/* Streaming video diffusion for C and C++ programs: a prompt goes in, frames come out while they are made.
 *
 * The whole loop of a caller:
 *
 *     greedy_bundle *bundle;
 *     greedy_session *session;
 *     greedy_frame *frame;
 *     char why[256];
 *     if (greedy_bundle_open(&bundle, "sprites.bundle", NULL, why, sizeof why) < 0) return give_up(why);
 *     if (greedy_open(&session, bundle, 1, why, sizeof why) < 0) return give_up(why);
 *     greedy_set_prompt(session, "a red circle moving right slowly on a gray background", 1);
 *     while (shown < 240 && greedy_next_frame(session, &frame) == GREEDY_OK) {
 *         show(frame->data, frame->width, frame->height);
 *         greedy_frame_unref(&frame);
 *         ++shown;
 *     }
 *     greedy_close(&session);
 *     greedy_bundle_close(&bundle);
 *
 * Status: GREEDY_OK or a negative number of enum greedy_status. What went wrong, in one line
 * ("what: got X, expected Y"), is written to the `error` buffer of the two open functions (cut to its size, always
 * terminated, may be NULL) and kept by the session for greedy_error.
 *
 * Threads: a bundle may be used by any threads at once. A session belongs to one thread at a time, except for
 * greedy_set_prompt*, greedy_cancel and greedy_error, which any thread may call while another is in
 * greedy_next_frame. Frames may be kept, read and released on any thread, also after their session is closed.
 *
 * Nothing here exits, aborts or throws, and there is no global state: what is opened is all there is.
 */
#ifndef GREEDY_GREEDY_H
#define GREEDY_GREEDY_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define GREEDY_API
#else
#define GREEDY_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum greedy_status {
    GREEDY_OK = 0,
    GREEDY_INVALID = -1,    /* an argument, or a call at the wrong time */
    GREEDY_NOT_FOUND = -2,  /* a file or directory that does not exist */
    GREEDY_BAD_BUNDLE = -3, /* a bundle, or a file of it, that is not what it says */
    GREEDY_NO_BACKEND = -4, /* no plugin for the backend, or a library that the plugin needs is missing */
    GREEDY_NO_MEMORY = -5,
    GREEDY_CANCELLED = -6, /* greedy_cancel was called; the stream goes on with the next greedy_next_frame */
    GREEDY_FAILED = -7     /* a graph or the system failed; the same chunk is made again by the next call */
};

/* Opened weights and compiled graphs; shared by any number of sessions. */
typedef struct greedy_bundle greedy_bundle;
/* One video in the making. */
typedef struct greedy_session greedy_session;

enum greedy_log_level { GREEDY_LOG_ERROR = 0, GREEDY_LOG_INFO = 1, GREEDY_LOG_DEBUG = 2 };

/* Called on the thread that opens or streams; `text` is valid during the call. It must not call this library. */
typedef void (*greedy_log_callback)(void *cookie, int level, const char *text);

/* Fill with greedy_settings_init, then change what should differ. Strings are only read during the open call. */
typedef struct greedy_settings {
    const char *backend;     /* "aoti", "tensorrt", ...; NULL: the bundle's first backend that opens here */
    const char *plugin_dir;  /* where libgreedy_<backend>.so lies; NULL: beside this library (or program) */
    const char *library_dir; /* where the plugin's own libraries lie (libtorch_cpu.so); NULL: the environment variable
                                GREEDY_LIBRARY_DIR, then beside the plugin, then the system's search path */
    int verify;              /* 1: sha256 of every file that is used; 0: only graphs, which are code. Default 1 */
    int parallel;            /* calls of one graph that may run at once, 1 to 64; more sessions wait. Default 1 */
    greedy_log_callback log; /* NULL: silence */
    void *log_cookie;
} greedy_settings;

/* What a bundle fixes. Strings belong to the bundle. */
typedef struct greedy_info {
    const char *preset, *backend, *target, *precision;
    int32_t width, height; /* pixels */
    double fps;
    int32_t chunk_frames;                                 /* frames of every chunk but the first */
    int32_t first_frames;                                 /* frames of the first chunk */
    int32_t text_rows, text_dim;                          /* of a prompt's embedding */
    int32_t latent_channels, latent_height, latent_width; /* of one latent frame */
    int32_t latent_frames;                                /* latent frames of a chunk */
} greedy_info;

/* One picture, read-only. The frames of a chunk lie one after another in memory. */
typedef struct greedy_frame {
    const uint8_t *data; /* RGB, 8 bits each, `height` rows of `stride` bytes, top row first */
    int32_t width, height;
    size_t stride;
    uint64_t index; /* since open or flush, from 0 */
    uint64_t chunk; /* since open or flush, from 0 */
    uint32_t left;  /* frames of the same chunk that follow */
} greedy_frame;

/* "0.1.0"; static. */
GREEDY_API const char *greedy_version(void);
/* "GREEDY_INVALID" for -1, and so on; static, never NULL. */
GREEDY_API const char *greedy_status_name(int status);

/* Defaults as stated beside each field. */
GREEDY_API void greedy_settings_init(greedy_settings *settings);

/* Open a bundle directory: read and check it, load the plugin, the weights (once) and every graph.
 * settings may be NULL. On success *bundle is the caller's, to be closed with greedy_bundle_close; otherwise NULL.
 * A graph of the aoti backend is machine code: only open bundles that you trust as you trust a program.
 * GREEDY_INVALID, GREEDY_NOT_FOUND, GREEDY_BAD_BUNDLE, GREEDY_NO_BACKEND, GREEDY_NO_MEMORY, GREEDY_FAILED. */
GREEDY_API int greedy_bundle_open(greedy_bundle **bundle, const char *path, const greedy_settings *settings,
                                  char *error, size_t error_size);

/* Give the bundle back and set *bundle to NULL; NULL is fine. Sessions that are open keep what they need. */
GREEDY_API void greedy_bundle_close(greedy_bundle **bundle);

/* GREEDY_OK, GREEDY_INVALID. */
GREEDY_API int greedy_bundle_info(const greedy_bundle *bundle, greedy_info *info);

/* Start a video. The same seed and prompt give the same video, here and in Python. Nothing is computed yet.
 * On success *session is the caller's, to be closed with greedy_close; otherwise NULL.
 * GREEDY_INVALID, GREEDY_NO_MEMORY, GREEDY_FAILED. */
GREEDY_API int greedy_open(greedy_session **session, greedy_bundle *bundle, uint64_t seed, char *error,
                           size_t error_size);

/* The prompt, from the next chunk on; may be called while streaming, from any thread; copies what it is given.
 * recommit 1 rewrites what the stream remembers under the new prompt, so that the past stops pulling towards the
 * old one; 0 leaves it. Of several calls before a chunk the last one counts. As UTF-8 text; as token ids of the
 * bundle's tokenizer, at most text_rows, its end token included; or as an embedding [text_rows, text_dim].
 * GREEDY_INVALID, GREEDY_NO_MEMORY. */
GREEDY_API int greedy_set_prompt(greedy_session *session, const char *text, int recommit);
GREEDY_API int greedy_set_prompt_tokens(greedy_session *session, const int64_t *ids, size_t count, int recommit);
GREEDY_API int greedy_set_prompt_embedding(greedy_session *session, const float *embedding, size_t rows, int recommit);

/* Start from a picture (count 1) or continue a clip: RGB frames of the bundle's size, tightly packed, before the first
 * greedy_next_frame. They come back first, re-encoded; of a long clip only the end is kept. Copies nothing it is
 * given but the encoded latents. GREEDY_INVALID, GREEDY_NO_MEMORY, GREEDY_FAILED. */
GREEDY_API int greedy_push_frames(greedy_session *session, const uint8_t *rgb, size_t count);

/* The same, already encoded: [latent_channels, frames, latent_height, latent_width], frames a multiple of
 * latent_frames. Copies. GREEDY_INVALID, GREEDY_NO_MEMORY. */
GREEDY_API int greedy_push_latent(greedy_session *session, const float *latent, size_t frames);

/* The next frame; makes a chunk when none is left. On success *frame is a reference of the caller's, to be given back
 * with greedy_frame_unref; otherwise NULL. A call that fails changes nothing: the next one makes the same frame.
 * GREEDY_INVALID (no prompt yet), GREEDY_CANCELLED, GREEDY_NO_MEMORY, GREEDY_FAILED. */
GREEDY_API int greedy_next_frame(greedy_session *session, greedy_frame **frame);

/* One more reference to a frame; returns it. */
GREEDY_API greedy_frame *greedy_frame_ref(greedy_frame *frame);
/* Give a reference back and set *frame to NULL; NULL is fine. */
GREEDY_API void greedy_frame_unref(greedy_frame **frame);

/* Make the greedy_next_frame that runs now, or else the next one, return GREEDY_CANCELLED once, at the end of the
 * graph that is running. From any thread. */
GREEDY_API void greedy_cancel(greedy_session *session);

/* Start over at frame 0 with the same seed and the prompt set last: drops frames that wait, pushed latents, caches and
 * a pending cancel. Frames that the caller holds stay. GREEDY_OK, GREEDY_INVALID. */
GREEDY_API int greedy_flush(greedy_session *session);

/* The session's last failure as text ("" if none), copied to `out` and cut to its size; returns its whole length. */
GREEDY_API size_t greedy_error(const greedy_session *session, char *out, size_t size);

/* End the video and set *session to NULL; NULL is fine. Not while another thread is inside this session. */
GREEDY_API void greedy_close(greedy_session **session);

#ifdef __cplusplus
}
#endif
#endif
