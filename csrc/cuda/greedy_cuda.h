/* Kernels in CUDA C++ for sm_90a, in plain C: they throw nothing, keep no state and wait for no stream.
 *
 * Pointers are device memory, dense and row-major, aligned to 16 bytes. A call returns 0, or it launches nothing and
 * returns a negative status; greedy_cuda_message has its text. Calls may be captured into a CUDA graph. */
#ifndef GREEDY_CUDA_H
#define GREEDY_CUDA_H

#if defined(__GNUC__)
#define GREEDY_CUDA_API __attribute__((visibility("default")))
#else
#define GREEDY_CUDA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* out = (x * x_scale) (weight * weight_scale)^T + bias, sums over more than 128 products in float32.
 *
 * x [rows, depth] and weight [columns, depth] e4m3, x_scale [rows] and weight_scale [columns] float32, bias [columns]
 * bfloat16 or NULL, out [rows, columns] bfloat16; columns and depth multiples of 16. stream is a cudaStream_t. */
GREEDY_CUDA_API int greedy_cuda_fp8_linear(const void* x, const float* x_scale, const void* weight,
                                           const float* weight_scale, const void* bias, void* out, int rows,
                                           int columns, int depth, void* stream);

/* Shared memory that a block of greedy_cuda_fp8_linear takes. */
GREEDY_CUDA_API int greedy_cuda_fp8_linear_shared_bytes(void);

/* The text of a status, a static string. */
GREEDY_CUDA_API const char* greedy_cuda_message(int status);

#ifdef __cplusplus
}
#endif

#endif
