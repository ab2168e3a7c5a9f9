/* The C interface of the CPU kernels: plain structs, so that one binary serves every version of Python and torch.
 *
 * What each op means is written once, in src/quamba/kernels/reference/; here are only its arguments. A program is a
 * list of ops on fixed buffers, run by one call: qb_run. Structs are mirrored in src/quamba/kernels/cpu/abi.py.
 */
#ifndef QUAMBA_CPU_H
#define QUAMBA_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QB_ABI 1

enum QbDtype { QB_F32 = 0, QB_BF16 = 1, QB_F16 = 2, QB_I8 = 3 };
enum QbRounding { QB_HALF_EVEN = 0, QB_HALF_AWAY = 1 };
enum QbOverflow { QB_SATURATE = 0, QB_WRAP = 1 };

/* (batch, length, channels), channels next to each other; strides in elements.
 * scale: NULL for floats; for int8 codes float32 scales, one (scale_step 0) or one a channel (scale_step 1). */
typedef struct {
    void *data;
    const float *scale;
    int64_t batch_stride, token_stride;
    int32_t dtype, scale_step;
} QbTensor;

/* y = x w^T: x (1, rows, columns) int8 or float, y (1, rows, outputs).
 * bits 8: w int8 [outputs, columns]; bits 4: two to a byte, the even column in the low half; bits 32 and 16: floats of
 * scale_dtype, x floats too, and no scale.
 * scale: QB_F32 or QB_F16 [outputs or 1, groups]; scale_rows says which. channel_scale: NULL, or two levels.
 * row_unit [outputs]: NULL, or what the scales of a row of int4 are 1 to 16 times; many rows of integers are then
 * multiplied by int8, whole rows of w at once. groups is then 1, or groups are multiples of 128 columns.
 * x_scale: NULL where the columns of w contain the scale of integer x, else one value. */
typedef struct {
    QbTensor x, y;
    int64_t rows, columns, outputs, groups, scale_rows;
    const void *weight, *scale;
    const float *channel_scale, *row_unit, *bias, *x_scale;
    int32_t bits, scale_dtype;
} QbLinear;

/* ids (rows) -> y (1, rows, columns) of the table `weight`, as in QbLinear; bits 32 and 16: floats of scale_dtype. */
typedef struct {
    const int64_t *ids;
    QbTensor y;
    int64_t rows, columns, groups, scale_rows;
    const void *weight, *scale;
    int32_t bits, scale_dtype;
} QbEmbedding;

/* sum = x + residual; y = norm(sum) * weight + bias. residual.data NULL: zeros; sum.data NULL: not wanted.
 * sum may be residual. All (1, rows, columns). */
typedef struct {
    QbTensor x, residual, sum, y;
    int64_t rows, columns;
    const float *weight, *bias;
    float eps;
    int32_t center;
} QbAddNorm;

/* v = norm(y * silu(z)) * weight in groups of channels, then out = rotated v (or v).
 * z.data NULL: no gate and no norm, only the rotation. rotate 0, or 1 (T x) or 2 (T^T x).
 * paley: order * order signs, float32, of the slow factor; order 1 for powers of two. */
typedef struct {
    QbTensor y, z, out;
    int64_t rows, columns, group_size, paley_order;
    const float *weight, *paley;
    float eps;
    int32_t norm_before_gate, rotate, rounding, overflow;
} QbGatedNorm;

/* x, y (batch, length, channels); weight [width, channels], up to 4: float32 taps, for codes integers as float32;
 * product_scale: NULL, or what a step of the sum stands for (product_step as scale_step).
 * state (batch, width - 1, channels) in the dtype of x, or NULL; mask (batch, length) bytes or NULL. */
typedef struct {
    QbTensor x, y, state;
    int64_t batch, length, channels, width;
    const float *weight, *bias, *product_scale;
    const uint8_t *mask;
    int32_t product_step, rounding;
} QbConv;

/* The cached state (batch, channels, d_state), contiguous; int8 with scales of a group of channels.
 * scale NULL for floats. group: NULL, or the row of `scale` of each channel; scale_columns 1 or d_state;
 * without group scale_rows is 1 or channels. */
typedef struct {
    void *data;
    const float *scale;
    const int32_t *group;
    int64_t scale_rows, scale_columns;
    int32_t dtype, unused;
} QbState;

/* Mamba2's scan. x, y (batch, length, heads * headdim), dt (batch, length, heads), B, C (batch, length, groups *
 * d_state); A, dt_bias [heads], D [heads * headdim]; dt_bias and D may be NULL, state.data too. */
typedef struct {
    QbTensor x, dt, B, C, y;
    QbState state;
    int64_t batch, length, heads, headdim, groups, d_state;
    const float *A, *D, *dt_bias;
    const uint8_t *mask;
    float dt_min, dt_max;
} QbSsd;

/* Mamba1's scan. u, dt, z, y (batch, length, channels), B, C (batch, length, d_state), A [channels, d_state];
 * z.data, D, dt_bias and state.data may be NULL. */
typedef struct {
    QbTensor u, dt, z, B, C, y;
    QbState state;
    int64_t batch, length, channels, d_state;
    const float *A, *D, *dt_bias;
    const uint8_t *mask;
} QbSelectiveScan;

/* y = codes of x (1, rows, columns). */
typedef struct {
    QbTensor x, y;
    int64_t rows, columns;
    int32_t rounding, overflow;
} QbQuantize;

enum QbKind {
    QB_LINEAR = 0,
    QB_EMBEDDING = 1,
    QB_ADD_NORM = 2,
    QB_GATED_NORM = 3,
    QB_CONV = 4,
    QB_SSD = 5,
    QB_SELECTIVE_SCAN = 6,
    QB_QUANTIZE = 7,
    QB_KINDS = 8
};

typedef struct {
    int64_t kind;
    const void *args;
} QbOp;

int qb_abi(void);
/* Bytes of the struct of a kind: a mirror that has gone out of step is found before it is used. */
int64_t qb_size_of(int64_t kind);
/* Instruction sets this binary has kernels for and this machine runs, best first, with commas between. */
const char *qb_instruction_sets(void);
const char *qb_instruction_set(void);
/* 0, or -1 for one that is not in the list. */
int qb_use_instruction_set(const char *name);
int qb_threads(void);
void qb_set_threads(int count);
/* Runs the ops one after the other, each on all threads. Calls from several threads take turns. */
void qb_run(const QbOp *ops, int64_t count);
/* Reads bytes of memory on all threads, and gives a sum of them: what the bandwidth of reading is measured with. */
uint64_t qb_read(const void *data, int64_t bytes);

#ifdef __cplusplus
}
#endif
#endif
