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
 * Status: GREEDY_OK or a negative number of enum greedy_status. A failure has one line of text
 * ("what: got X, expected Y"). The two open functions write it to their `error` buffer (cut to its size, always
 * terminated, may be NULL); a session keeps it for greedy_error.
 *
 * Threads: any threads may use a bundle at once. A session belongs to one thread at a time, except for
 * greedy_set_prompt*, greedy_change, greedy_cancel and greedy_error, which any thread may call while another is in
 * greedy_next_frame. Any thread may keep, read and release frames, also after their session is closed.
 *
 * No function exits, aborts or throws. There is no global state beside the objects that the caller opens.
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
    GREEDY_BAD_BUNDLE = -3, /* a bundle whose files differ from its manifest */
    GREEDY_NO_BACKEND = -4, /* the backend's plugin, or a library that it needs, is missing */
    GREEDY_NO_MEMORY = -5,
    GREEDY_CANCELLED = -6, /* greedy_cancel was called; the next greedy_next_frame goes on */
    GREEDY_FAILED = -7,    /* a graph or the system failed; the next call makes the same chunk again */
    GREEDY_NOT_FINITE = -8 /* NaN or infinity arose, though all weights are finite; the text says where. The next call
                              makes the same chunk again. A weight that is not finite is GREEDY_BAD_BUNDLE */
};

/* Opened weights and compiled graphs, shared by any number of sessions. Do not write into the files of an open bundle;
 * a new one may be renamed into their place. */
typedef struct greedy_bundle greedy_bundle;
/* One video that is being made. */
typedef struct greedy_session greedy_session;

enum greedy_log_level { GREEDY_LOG_ERROR = 0, GREEDY_LOG_INFO = 1, GREEDY_LOG_DEBUG = 2 };

/* Runs on the thread that opens, streams or sets a prompt; `text` is valid during the call. It must not call this
 * library. */
typedef void (*greedy_log_callback)(void *cookie, int level, const char *text);

/* Fill with greedy_settings_init, then change fields. Strings are only read during the open call. */
typedef struct greedy_settings {
    const char *backend;     /* "aoti", "tensorrt", "tensorrt_rtx"; NULL: the bundle's first that opens here */
    const char *plugin_dir;  /* directory of libgreedy_<backend>.so; NULL: that of this library (or program), or the
                                installed lib beside the program's bin */
    const char *library_dir; /* directory of the plugin's own libraries (libtorch_cpu.so); NULL: the environment
                                variable GREEDY_LIBRARY_DIR, else beside the plugin, then the torch of its Python
                                environment, then the system's search path */
    int verify;              /* 1: compare the sha256 of weights, tokenizer and graphs; 0: of graphs alone. Default 1 */
    int parallel;            /* calls of one graph that may run at once, 1 to 64; more sessions wait. Default 1 */
    greedy_log_callback log; /* NULL: silence */
    void *log_cookie;
} greedy_settings;

/* Properties of a bundle. Strings belong to the bundle. */
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
    uint64_t prompt; /* greedy_set_prompt* calls that had succeeded before the one whose prompt it shows, or is on the
                        way to */
} greedy_frame;

/* "0.1.0"; static. */
GREEDY_API const char *greedy_version(void);
/* "GREEDY_INVALID" for -1, and so on; static, never NULL. */
GREEDY_API const char *greedy_status_name(int status);

/* Defaults as stated beside each field. */
GREEDY_API void greedy_settings_init(greedy_settings *settings);

/* Open a bundle directory: read and check it, load the plugin, the weights (once) and every graph.
 * settings may be NULL. On success the caller owns *bundle and closes it with greedy_bundle_close; otherwise it is
 * NULL. A graph of the aoti backend is machine code: only open bundles that you trust as you trust a program.
 * GREEDY_INVALID, GREEDY_NOT_FOUND, GREEDY_BAD_BUNDLE, GREEDY_NO_BACKEND, GREEDY_NO_MEMORY, GREEDY_FAILED. */
GREEDY_API int greedy_bundle_open(greedy_bundle **bundle, const char *path, const greedy_settings *settings,
                                  char *error, size_t error_size);

/* Give the bundle back and set *bundle to NULL; NULL is fine. Open sessions stay valid. */
GREEDY_API void greedy_bundle_close(greedy_bundle **bundle);

/* GREEDY_OK, GREEDY_INVALID. */
GREEDY_API int greedy_bundle_info(const greedy_bundle *bundle, greedy_info *info);

/* Start a video. The same seed and prompt give the same video, here and in Python. Nothing is computed yet.
 * On success the caller owns *session and closes it with greedy_close; otherwise it is NULL.
 * GREEDY_INVALID, GREEDY_NO_MEMORY, GREEDY_FAILED, GREEDY_BAD_BUNDLE (caches in FP8, which only Python streams). */
GREEDY_API int greedy_open(greedy_session **session, greedy_bundle *bundle, uint64_t seed, char *error,
                           size_t error_size);

/* Set the prompt from the next chunk on. Any thread may call these while another streams. They copy their arguments.
 * recommit 1 rewrites the stream's cached keys and values under the new prompt, so that they do not pull towards the
 * old one; 0 keeps them, those too that a failed greedy_next_frame wrote under its own prompt. Of several calls before
 * a chunk the last prompt counts; keys are rewritten if one of them asked for it. The prompt is UTF-8 text; token ids
 * of the bundle's tokenizer, at most text_rows, the end token included; or an embedding [text_rows, text_dim]. Text is
 * cleaned as Wan's pipeline cleans it (ftfy, HTML entities, white space). A text of more than 16,384 characters (2,048
 * with HTML entities, garbled text or combining marks), or without a visible one, is GREEDY_INVALID. The rest of a text
 * of more than text_rows tokens is ignored, with a note in the log (INFO).
 * GREEDY_INVALID, GREEDY_NO_MEMORY. */
GREEDY_API int greedy_set_prompt(greedy_session *session, const char *text, int recommit);
GREEDY_API int greedy_set_prompt_tokens(greedy_session *session, const int64_t *ids, size_t count, int recommit);
GREEDY_API int greedy_set_prompt_embedding(greedy_session *session, const float *embedding, size_t rows, int recommit);

/* The same with `count` texts and their weights, all above 0: the prompt is the weighted mean of their embeddings.
 * `transition` is the number of chunks in which the prompt is reached (at most 2^20; 0 and 1: at once), in equal steps
 * from the embedding that acts when the next chunk is made; before the first chunk, that of the prompt that was set
 * first. With recommit 1 each chunk on the way rewrites the keys. greedy_flush ends a transition: the prompt that was
 * set last acts at once. */
GREEDY_API int greedy_set_prompt_blend(greedy_session *session, const char *const *texts, const double *weights,
                                       size_t count, int transition, int recommit);
GREEDY_API int greedy_set_prompt_embedding_blend(greedy_session *session, const float *embedding, size_t rows,
                                                 int transition, int recommit);

/* What greedy_change changes. A zeroed struct changes nothing. */
typedef struct greedy_changes {
    const uint64_t *seed;    /* NULL: stays */
    const double *steps;     /* timesteps as the preset has them: the rows of chunk 0, chunk 1, ..., the rest in turn */
    const size_t *row_sizes; /* number of timesteps of each row */
    size_t rows;             /* 0: the steps stay */
} greedy_changes;

/* Change seed and denoising steps from the next chunk on, all or, after a failure, none. Any thread may call this while
 * another streams. Noise depends on the seed and the chunk alone. greedy_flush keeps what was changed. Everything is
 * copied. GREEDY_INVALID, GREEDY_NO_MEMORY. */
GREEDY_API int greedy_change(greedy_session *session, const greedy_changes *changes);

/* Start from a picture (count 1) or continue a clip: RGB frames of the bundle's size, tightly packed, before the first
 * greedy_next_frame. The stream shows them first, re-encoded; of a long clip it keeps the end. The pixels are only read
 * during the call. Of several pushes the last one counts. It heeds no greedy_cancel.
 * GREEDY_INVALID, GREEDY_NO_MEMORY, GREEDY_FAILED, GREEDY_NOT_FINITE, GREEDY_BAD_BUNDLE. */
GREEDY_API int greedy_push_frames(greedy_session *session, const uint8_t *rgb, size_t count);

/* The same with encoded latents [latent_channels, frames, latent_height, latent_width]; frames is a multiple of
 * latent_frames. The latents are copied. GREEDY_INVALID, GREEDY_NO_MEMORY. */
GREEDY_API int greedy_push_latent(greedy_session *session, const float *latent, size_t frames);

/* Get the next frame; makes a chunk when no frame is left. On success the caller owns a reference *frame and returns it
 * with greedy_frame_unref; otherwise it is NULL. A call that fails changes nothing: the next one makes the same frame.
 * GREEDY_INVALID (no prompt yet), GREEDY_CANCELLED, GREEDY_NO_MEMORY, GREEDY_FAILED, GREEDY_NOT_FINITE,
 * GREEDY_BAD_BUNDLE (a weight that is not finite, or a file of weights that was written to). */
GREEDY_API int greedy_next_frame(greedy_session *session, greedy_frame **frame);

/* Take one more reference to a frame; returns the frame. */
GREEDY_API greedy_frame *greedy_frame_ref(greedy_frame *frame);
/* Give a reference back and set *frame to NULL; NULL is fine. */
GREEDY_API void greedy_frame_unref(greedy_frame **frame);

/* Make the greedy_next_frame that runs now, or else the next one, return GREEDY_CANCELLED once, at the end of the
 * graph that is running. Any thread may call this. */
GREEDY_API void greedy_cancel(greedy_session *session);

/* Start over at frame 0 with the seed, the steps and the prompt that were set last. Drops waiting frames, pushed
 * latents, caches and a pending cancel; the caller's frames stay valid. GREEDY_OK, GREEDY_INVALID. */
GREEDY_API int greedy_flush(greedy_session *session);

/* Copy the text of the session's last failure ("" if none) to `out`, cut to its size; returns the whole length. */
GREEDY_API size_t greedy_error(const greedy_session *session, char *out, size_t size);

/* End the video and set *session to NULL; NULL is fine. No other thread may be inside this session. */
GREEDY_API void greedy_close(greedy_session **session);

#ifdef __cplusplus
}
#endif
#endif
