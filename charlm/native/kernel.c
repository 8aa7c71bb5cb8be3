/* A GPT's forward pass on a CPU, for generation: no gradients, keys and values kept, float32 sums.

   `charlm/models/layers.py` is what is computed, to be read; this file computes the same for a model of a few
   million parameters, where the calls of a framework cost more than the arithmetic. `library.py` compiles it,
   `weights.py` packs the weights, and `gpt.py` calls `charlm_pass` and `charlm_turns`; nothing else does. The threads
   are in pool.h, the choice of an id in choose.h, n-grams in ngrams.h, what
   compresses with them in coding.h, mixtures in mix.h, and what makes the portable build the same on every machine in portable.h.

   One rule holds everywhere: a number is the result of the same operations in the same order, however many
   other rows, characters or threads take part. So a text does not depend on what it is generated beside, and a
   prompt read at once gives the bits that it gives when read character by character.

   B rows of text, n characters in this pass, C channels, H heads of D, F hidden, V vocabulary, S positions.
   Widths are padded to multiples of 16 with zeros (Cp, Dp, Fp, Vp). The layout of packed matrices, panels of 64
   columns, and of the small products over them follows Goto and van de Geijn, "Anatomy of high-performance
   matrix multiplication" (2008). */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif

#include "portable.h"

#include "choose.h"
#include "mix.h"
#include "ngrams.h"
#include "coding.h"
#include "pool.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define PANEL 64 /* columns of a packed matrix that stand together */
#define ROWS 6   /* rows of a tile */

static int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint8_t bvec __attribute__((vector_size(LANES), aligned(1), may_alias));
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 8")
#endif

enum { LAYERNORM, RMSNORM };
enum { RELU, GELU, GELU_TANH, RELU2, SWIGLU };
enum { FLOAT32, BFLOAT16, INT8 }; /* how weights are stored */

/* Packed matrices hold, for each panel of 64 output columns (the last one may be narrower), its K rows; those of
   int8 four rows at a time, a column's four numbers side by side. A bias may be NULL. */
struct matrix {
    const void *weights;
    const float *bias, *scales; /* scales: of int8, (N,): a weight is its column's times an integer */
    const int32_t *starts;      /* of int8, (N,): -128 times the sum of a column's integers */
    int64_t K, N;               /* multiples of 16 */
};
struct layer {
    const float *gain1, *shift1, *gain2, *shift2; /* of the norms, or NULL */
    struct matrix query, key_value, project, up, gate, down;
};
struct model {
    int64_t C, Cp, H, D, Dp, V, Vp, n_layer, norm, activation, qk_norm, storage, earlier;
    double norm_eps, qk_eps;
    const float *token_embedding;    /* (V, C) */
    const float *position_embedding; /* (block_size, C), or NULL */
    const float *convolution;        /* (earlier, C), of the embeddings of as many earlier characters, or NULL */
    const float *cos, *sin;          /* (block_size, D / 2), or NULL */
    const float *gain, *shift;       /* of the last norm, or NULL */
    struct matrix head;
    const struct layer *layers;
};

/* What one pass reads and writes. The new characters of a row stand together. */
struct pass {
    int64_t B, n, wanted, threads, capacity; /* capacity: positions that the caches hold, a multiple of 64 */
    const int64_t *begin;                    /* (B + 1,) where each row's characters begin */
    const int64_t *slot;                     /* (B,) each row's place in the caches */
    int64_t *id;                             /* (n,) */
    int64_t *before;                         /* (n, earlier), what stands before each, nearest first; -1: nothing */
    int64_t *position;                       /* (n,) */
    const int64_t *want;                     /* (wanted,) characters whose logits are asked for, increasing */
    void *keys;                              /* (n_layer, slots, H, capacity / 64, D, 64) */
    void *values;                            /* (n_layer, slots, H, capacity, Dp) */
    int64_t slots, half;                     /* half: whether keys and values are kept in bfloat16, not float32 */
    float *logits; /* (wanted, Vp) */
    float *work;   /* charlm_work(...) floats */
    const struct choice *how; /* NULL, or how an id is chosen for each row, of which one id is read */
    const struct walk *walk;  /* NULL, or what the texts have to match */
    const double *uniforms;   /* (B,), or NULL: the likeliest */
    int64_t *chosen;          /* (B,); -1 where none can be chosen */
};

/* ---- vectors ---- */

INLINE vec splat(float a) { return a - (vec){0}; }
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec pick(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
INLINE vec at_least(vec x, float low) { return pick(x < splat(low), splat(low), x); }
INLINE vec at_most(vec x, float high) { return pick(x > splat(high), splat(high), x); }

/* exp, after Cephes' expf: within 1 unit of the last place from -87 to 88. */
INLINE vec vexp(vec x) {
    x = at_most(at_least(x, -87.0f), 88.0f);
    const float magic = 12582912.0f; /* 1.5 * 2 ** 23: adding it rounds to an integer */
    vec n = (x * 1.44269504088896341f + magic) - magic;
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
    vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    ivec e = (__builtin_convertvector(n, ivec) + 127) << 23;
    return y * (vec)e;
}

/* The normal distribution's share below x. Abramowitz and Stegun 7.1.26: within 2.5e-7 in float32. */
INLINE vec normal_cdf(vec x) {
    vec z = (vec)((ivec)(x * 0.70710678118654752f) & 0x7fffffff); /* |x| / sqrt(2) */
    vec t = 1.0f / (1.0f + 0.3275911f * z);
    vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec tail = 0.5f * p * t * vexp(-z * z);
    return pick(x < splat(0.0f), tail, 1.0f - tail);
}

/* Sums of many numbers are kept in 16 lanes, whatever the vectors of the machine, so that their order is one. */
#define SUMS 16

static float sum_of_squares(const float *x, int64_t n) {
    vec sums[SUMS / LANES] = {{0}};
    float lanes[SUMS], sum = 0;
    int64_t i = 0;
    for (; i + SUMS <= n; i += SUMS)
        UNROLLED for (int v = 0; v < SUMS / LANES; v++) sums[v] += load(x + i + v * LANES) * load(x + i + v * LANES);
    for (int v = 0; v < SUMS / LANES; v++) store(lanes + v * LANES, sums[v]);
    for (; i < n; i++) lanes[i % SUMS] += x[i] * x[i];
    for (int l = 0; l < SUMS; l++) sum += lanes[l];
    return sum;
}

/* The norm of C numbers, and zeros up to Cp. */
static void normalise(const struct model *m, const float *x, const float *gain, const float *shift, float *out) {
    int64_t C = m->C;
    if (m->norm == LAYERNORM) {
        double sum = 0;
        for (int64_t i = 0; i < C; i++) sum += x[i];
        float mean = (float)(sum / C);
        for (int64_t i = 0; i < C; i++) out[i] = x[i] - mean;
    } else {
        memcpy(out, x, C * sizeof(float));
    }
    float scale = (float)(1.0 / sqrt(sum_of_squares(out, C) / C + m->norm_eps));
    for (int64_t i = 0; i < C; i++) out[i] *= scale;
    if (gain)
        for (int64_t i = 0; i < C; i++) out[i] *= gain[i];
    if (shift)
        for (int64_t i = 0; i < C; i++) out[i] += shift[i];
    for (int64_t i = C; i < m->Cp; i++) out[i] = 0;
}

/* ---- products ---- */

INLINE vec weights_at(const void *w, int64_t i, int half) {
    if (!half) return load((const float *)w + i);
    hvec bits = *(const hvec *)((const uint16_t *)w + i);
    return (vec)(__builtin_convertvector(bits, ivec) << 16);
}

/* y = x @ w for R rows and M vectors of columns. */
INLINE void tile(const int R, const int M, const int half, int64_t K, const float *x, int64_t ldx, const void *w,
                 int64_t ldw, float *y, int64_t ldy) {
    vec sums[ROWS][4]; /* not [R][M]: gcc keeps arrays of variable length in memory */
    UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int c = 0; c < M; c++) sums[r][c] = (vec){0};
    for (int64_t k = 0; k < K; k++) {
        vec row[4];
        UNROLLED for (int c = 0; c < M; c++) row[c] = weights_at(w, k * ldw + c * LANES, half);
        UNROLLED for (int r = 0; r < R; r++) {
            float a = x[r * ldx + k];
            UNROLLED for (int c = 0; c < M; c++) sums[r][c] += a * row[c];
        }
    }
    UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int c = 0; c < M; c++) store(y + r * ldy + c * LANES, sums[r][c]);
}

#define TILE(R, M, HALF)                               \
    case M: tile(R, M, HALF, K, x, ldx, w, ldw, y, ldy); break;
#define TILES(R, HALF)                                 \
    case R:                                            \
        switch (M) {                                   \
            TILE(R, 1, HALF)                           \
            TILE(R, 2, HALF)                           \
            TILE(R, 3, HALF)                           \
            TILE(R, 4, HALF)                           \
        }                                              \
        break;
#define TILES_OF(HALF)                                                                                        \
    static void tiles_##HALF(int64_t R, int64_t M, int64_t K, const float *x, int64_t ldx, const void *w,     \
                             int64_t ldw, float *y, int64_t ldy) {                                            \
        switch (R) {                                                                                          \
            TILES(1, HALF)                                                                                    \
            TILES(2, HALF)                                                                                    \
            TILES(3, HALF)                                                                                    \
            TILES(4, HALF)                                                                                    \
            TILES(6, HALF)                                                                                    \
        }                                                                                                     \
    }
TILES_OF(0)
TILES_OF(1)

/* y (R, N) = x (R, K) @ w (K, N), N a multiple of 16 and at most 64, by tiles. */
static void product(int half, int64_t R, int64_t N, int64_t K, const float *x, int64_t ldx, const void *w,
                    int64_t ldw, float *y, int64_t ldy) {
    for (int64_t r = 0; r < R;) {
        int64_t left = R - r, rows = left >= ROWS ? ROWS : left == 5 ? 3 : left;
        int64_t widest = LANES == 16 || rows <= 2 ? 4 : 2; /* vectors, so that all sums stay in registers */
        for (int64_t c = 0; c < N;) {
            int64_t vectors = (N - c) / LANES;
            if (vectors > widest) vectors = widest;
            const void *from = (const char *)w + c * (half ? 2 : 4);
            (half ? tiles_1 : tiles_0)(rows, vectors, K, x + r * ldx, ldx, from, ldw, y + r * ldy + c, ldy);
            c += vectors * LANES;
        }
        r += rows;
    }
}

/* Sums, and to them the products of four unsigned and four signed bytes in each lane. */
INLINE ivec add_products_of_four(ivec sums, ivec numbers, ivec weights) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)numbers, (__m512i)weights);
#elif defined(__AVXVNNI__) && LANES == 8
    return (ivec)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)numbers, (__m256i)weights);
#else
    UNROLLED for (int b = 0; b < 32; b += 8) sums += (numbers >> b & 255) * (weights << (24 - b) >> 24);
    return sums;
#endif
}

/* n rows of K numbers as integers from -32767 to 32767 times a scale of the row. 32768 is added to an integer, and
   its bytes stand apart: in each row K upper ones, then K lower ones. What is not finite has the scale NaN. */
static void to_integers(int64_t n, int64_t K, const float *x, int64_t ldx, uint8_t *bytes, float *scales) {
    for (int64_t r = 0; r < n; r++, x += ldx, bytes += 2 * K) {
        vec tops = {0}, finite = {0};
        float lanes[LANES], odd[LANES], top = 0, zero = 0;
        for (int64_t k = 0; k < K; k += LANES) {
            vec v = load(x + k), size = (vec)((ivec)v & 0x7fffffff);
            tops = pick(size > tops, size, tops);
            finite += v * 0.0f;
        }
        store(lanes, tops);
        store(odd, finite);
        for (int l = 0; l < LANES; l++) {
            top = lanes[l] > top ? lanes[l] : top;
            zero += odd[l];
        }
        scales[r] = top / 32767.0f + zero;
        float by = top > 1e-30f && zero == 0 ? 32767.0f / top : 0;
        for (int64_t k = 0; k < K; k += LANES) {
            /* 1.5 * 2 ** 23 rounds to an integer, which then stands in the lower bits. */
            ivec integer = (ivec)(load(x + k) * by + 12582912.0f) + 32768;
            *(bvec *)(bytes + k) = __builtin_convertvector(integer >> 8, bvec);
            *(bvec *)(bytes + K + k) = __builtin_convertvector(integer, bvec);
        }
    }
}

/* What `tile` does, of integers. Their sums are exact, in any order and on any machine, up to K = 65,000. */
INLINE void tile_of_integers(const int R, const int M, int64_t K, const uint8_t *x, const float *x_scales,
                             const struct matrix *w, int64_t column, int64_t width, float *y) {
    const int8_t *weights = (const int8_t *)w->weights + (column - column % PANEL) * K + column % PANEL * 4;
    ivec upper[3][4], lower[3][4];
    UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int c = 0; c < M; c++) {
            upper[r][c] = *(const ivec *)(w->starts + column + c * LANES);
            lower[r][c] = (ivec){0};
        }
    for (int64_t k = 0; k < K; k += 4) {
        ivec row[4];
        UNROLLED for (int c = 0; c < M; c++) row[c] = *(const ivec *)(weights + k * width + c * LANES * 4);
        UNROLLED for (int r = 0; r < R; r++) {
            int32_t u, l;
            memcpy(&u, x + 2 * r * K + k, 4);
            memcpy(&l, x + (2 * r + 1) * K + k, 4);
            ivec us = u - (ivec){0}, ls = l - (ivec){0};
            UNROLLED for (int c = 0; c < M; c++) {
                upper[r][c] = add_products_of_four(upper[r][c], us, row[c]);
                lower[r][c] = add_products_of_four(lower[r][c], ls, row[c]);
            }
        }
    }
    UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int c = 0; c < M; c++) {
            vec sums = 256.0f * __builtin_convertvector(upper[r][c], vec) + __builtin_convertvector(lower[r][c], vec);
            store(y + r * PANEL + c * LANES, sums * (x_scales[r] * load(w->scales + column + c * LANES)));
        }
}

#define TILE_OF_INTEGERS(R, M)                                                             \
    case 4 * R + M: tile_of_integers(R, M, K, x, x_scales, w, column + c, width, y + c); break;

static void product_of_integers(int64_t R, int64_t width, const uint8_t *x, const float *x_scales,
                                const struct matrix *w, int64_t column, float *y) {
    const int64_t K = w->K, most = LANES == 16 ? 3 : 1; /* so that all sums stay in registers */
    for (int64_t r = 0, rows; r < R; r += rows, x += 2 * rows * K, x_scales += rows, y += rows * PANEL) {
        rows = R - r < most ? R - r : most;
        for (int64_t c = 0, vectors; c < width; c += vectors * LANES) {
            vectors = (width - c) / LANES < 4 ? (width - c) / LANES : 4;
            switch (4 * rows + vectors) {
                TILE_OF_INTEGERS(1, 1)
                TILE_OF_INTEGERS(1, 2)
                TILE_OF_INTEGERS(1, 3)
                TILE_OF_INTEGERS(1, 4)
                TILE_OF_INTEGERS(2, 1)
                TILE_OF_INTEGERS(2, 2)
                TILE_OF_INTEGERS(2, 3)
                TILE_OF_INTEGERS(2, 4)
                TILE_OF_INTEGERS(3, 1)
                TILE_OF_INTEGERS(3, 2)
                TILE_OF_INTEGERS(3, 3)
                TILE_OF_INTEGERS(3, 4)
            }
        }
    }
}

static void activate(const struct model *m, float *h, const float *gate, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        vec x = load(h + i);
        switch (m->activation) {
            case RELU: x = at_least(x, 0.0f); break;
            case RELU2: x = at_least(x, 0.0f); x *= x; break;
            case GELU: x *= normal_cdf(x); break;
            case GELU_TANH: x /= 1.0f + vexp(-1.5957691216057308f * (x + 0.044715f * x * x * x)); break;
            default: { vec g = load(gate + i); x *= g / (1.0f + vexp(-g)); }
        }
        store(h + i, x);
    }
}

/* y = x @ matrix + bias, or added to y; if `after`, the activation follows. A unit is a panel of some rows.
   `room` is for `to_integers`. */
static void linear(struct worker *me, const struct model *m, const struct matrix *w, const struct matrix *gate,
                   int64_t n, const float *x, int64_t ldx, float *y, int64_t ldy, int add, int after, float *room) {
    const int64_t some = 8 * ROWS;
    int64_t panels = (w->N + PANEL - 1) / PANEL, groups = (n + some - 1) / some, from, to;
    float out[8 * ROWS * PANEL], gates[8 * ROWS * PANEL], *scales = room;
    uint8_t *bytes = (uint8_t *)(room + padded(n));
    share(me, panels * groups, &from, &to);
    if (m->storage == INT8 && from < to) to_integers(n, w->K, x, ldx, bytes, scales);
    for (int64_t unit = from; unit < to; unit++) {
        int64_t panel = unit / groups, first = unit % groups * some;
        int64_t rows = n - first < some ? n - first : some;
        int64_t column = panel * PANEL, width = w->N - column < PANEL ? w->N - column : PANEL;
        for (int g = 0; g < (gate ? 2 : 1); g++) {
            const struct matrix *one = g ? gate : w;
            int64_t half = m->storage == BFLOAT16, offset = column * w->K * (half ? 2 : 4);
            if (m->storage == INT8)
                product_of_integers(rows, width, bytes + 2 * first * w->K, scales + first, one, column, g ? gates : out);
            else
                product(half, rows, width, w->K, x + first * ldx, ldx, (const char *)one->weights + offset, width,
                        g ? gates : out, PANEL);
        }
        for (int64_t r = 0; r < rows; r++) {
            float *o = out + r * PANEL, *g = gates + r * PANEL, *to_y = y + (first + r) * ldy + column;
            if (w->bias)
                for (int64_t c = 0; c < width; c += LANES) store(o + c, load(o + c) + load(w->bias + column + c));
            if (gate && gate->bias)
                for (int64_t c = 0; c < width; c += LANES) store(g + c, load(g + c) + load(gate->bias + column + c));
            if (after) activate(m, o, g, width);
            if (add)
                for (int64_t c = 0; c < width; c += LANES) store(to_y + c, load(to_y + c) + load(o + c));
            else
                memcpy(to_y, o, width * sizeof(float));
        }
    }
}

/* ---- attention ---- */

/* Normalise and turn one head's query or key in place. */
static void norm_and_rotate(const struct model *m, float *head, int64_t position) {
    int64_t D = m->D, half = D / 2;
    if (m->qk_norm) {
        float scale = (float)(1.0 / sqrt(sum_of_squares(head, D) / D + m->qk_eps));
        for (int64_t d = 0; d < D; d++) head[d] *= scale;
    }
    if (m->cos) {
        const float *cos = m->cos + position * half, *sin = m->sin + position * half;
        for (int64_t d = 0; d < half; d++) {
            float left = head[d], right = head[half + d];
            head[d] = left * cos[d] - right * sin[d];
            head[half + d] = left * sin[d] + right * cos[d];
        }
    }
}

/* Keep a number in float32, or rounded to bfloat16. */
INLINE void keep(void *to, int64_t i, float x, int half) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    if (half)
        ((uint16_t *)to)[i] = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
    else
        ((float *)to)[i] = x;
}

static float softmax(float *scores, int64_t length, int64_t width) {
    float top = scores[0], lanes[SUMS], sum = 0;
    for (int64_t s = 1; s < length; s++) top = scores[s] > top ? scores[s] : top;
    for (int64_t s = length; s < width; s++) scores[s] = 0;
    vec sums[SUMS / LANES] = {{0}};
    int64_t s = 0;
    for (; s + SUMS <= length; s += SUMS)
        UNROLLED for (int v = 0; v < SUMS / LANES; v++) {
            vec e = vexp(load(scores + s + v * LANES) - top);
            store(scores + s + v * LANES, e);
            sums[v] += e;
        }
    for (int v = 0; s < length; s += LANES, v++) {
        vec e = vexp(load(scores + s) - top);
        for (int l = 0; l < LANES; l++)
            if (s + l >= length) e[l] = 0;
        store(scores + s, e);
        sums[v] += e;
    }
    for (int v = 0; v < SUMS / LANES; v++) store(lanes + v * LANES, sums[v]);
    for (int l = 0; l < SUMS; l++) sum += lanes[l];
    return sum;
}

/* One head of one row: keep the new keys and values, then gather for each query. */
static void attend(const struct model *m, const struct pass *p, int64_t layer, int64_t row, int64_t head,
                   int64_t q_from, int64_t q_to, const int64_t *want, float *q, float *kv, float *y, float *scores) {
    int64_t D = m->D, Dp = m->Dp, HD = m->H * Dp, capacity = p->capacity;
    int64_t at = (layer * p->slots + p->slot[row]) * m->H + head;
    int half = p->half, size = half ? 2 : 4;
    char *keys = (char *)p->keys + at * capacity * D * size, *values = (char *)p->values + at * capacity * Dp * size;
    for (int64_t t = p->begin[row]; t < p->begin[row + 1]; t++) {
        int64_t s = p->position[t];
        float *k = kv + t * 2 * HD + head * Dp;
        norm_and_rotate(m, k, s);
        for (int64_t d = 0; d < D; d++) keep(keys, (s / PANEL * D + d) * PANEL + s % PANEL, k[d], half);
        for (int64_t d = 0; d < Dp; d++) keep(values, s * Dp + d, k[HD + d], half);
    }
    float scale = (float)(1 / sqrt((double)D));
    for (int64_t i = q_from; i < q_to;) {
        int64_t left = q_to - i, R = left >= ROWS ? ROWS : left == 5 ? 3 : left, longest = 0;
        float sums[ROWS];
        for (int64_t r = 0; r < R; r++) {
            int64_t s = p->position[want ? want[i + r] : i + r];
            float *one = q + (i + r) * HD + head * Dp;
            norm_and_rotate(m, one, s);
            for (int64_t d = 0; d < D; d++) one[d] *= scale;
            if (s + 1 > longest) longest = s + 1;
        }
        int64_t width = padded(longest);
        for (int64_t s = 0; s < width; s += PANEL)
            product(half, R, width - s < PANEL ? width - s : PANEL, D, q + i * HD + head * Dp, HD,
                    keys + s * D * size, PANEL, scores + s, capacity);
        for (int64_t r = 0; r < R; r++)
            sums[r] = softmax(scores + r * capacity, p->position[want ? want[i + r] : i + r] + 1, width);
        for (int64_t d = 0; d < Dp; d += PANEL)
            product(half, R, Dp - d < PANEL ? Dp - d : PANEL, longest, scores, capacity, values + d * size, Dp,
                    y + i * HD + head * Dp + d, HD);
        for (int64_t r = 0; r < R; r++)
            for (int64_t d = 0; d < D; d++) y[(i + r) * HD + head * Dp + d] *= 1 / sums[r];
        i += R;
    }
}

/* ---- the whole model ---- */

static int64_t hidden(const struct model *m) { return m->layers[0].up.N; }

/* Floats that each worker has for itself: rows after a norm, scores, rows as integers, the choice of an id. */
static int64_t own_work(const struct model *m, int64_t n, int64_t capacity) {
    int64_t widest = m->H * m->Dp > m->Cp ? m->H * m->Dp : m->Cp;
    widest = hidden(m) > widest ? hidden(m) : widest;
    return n * m->Cp + ROWS * capacity + (m->storage == INT8 ? padded(n) + n * widest / 2 : 0) + 4 * m->Vp;
}

/* Floats of work space that a pass needs. */
int64_t charlm_work(const struct model *m, int64_t n, int64_t threads, int64_t capacity) {
    return n * (m->Cp + 4 * m->H * m->Dp + hidden(m)) + threads * own_work(m, n, capacity);
}

static void run(struct worker *me, const void *model, const void *pass) {
    const struct model *m = model;
    const struct pass *p = pass;
    int64_t C = m->C, Cp = m->Cp, HD = m->H * m->Dp, F = hidden(m), n = p->n;
    float *x = p->work, *q = x + n * Cp, *kv = q + n * HD, *y = kv + n * 2 * HD, *h = y + n * HD;
    float *own = h + n * F + me->number * own_work(m, n, p->capacity), *scores = own + n * Cp;
    float *for_choice = scores + ROWS * p->capacity, *room = for_choice + 4 * m->Vp;
    int64_t from, to;
    int chooses = p->how != 0; /* after the last barrier the pass may be gone */
    share(me, n, &from, &to);
    for (int64_t t = from; t < to; t++) {
        const float *e = m->token_embedding + p->id[t] * C;
        const float *w = m->position_embedding ? m->position_embedding + p->position[t] * C : 0;
        for (int64_t c = 0; c < C; c++) x[t * Cp + c] = e[c];
        for (int64_t k = 0; k < m->earlier && p->before[t * m->earlier + k] >= 0; k++) {
            const float *b = m->token_embedding + p->before[t * m->earlier + k] * C, *by = m->convolution + k * C;
            for (int64_t c = 0; c < C; c++) x[t * Cp + c] += b[c] * by[c];
        }
        if (w)
            for (int64_t c = 0; c < C; c++) x[t * Cp + c] += w[c];
        for (int64_t c = C; c < Cp; c++) x[t * Cp + c] = 0;
    }
    barrier(me);
    for (int64_t l = 0; l < m->n_layer; l++) {
        const struct layer *layer = m->layers + l;
        /* In the last layer only the characters whose logits are wanted go on; the others leave keys and values. */
        int last = l == m->n_layer - 1 && p->wanted < n;
        int64_t queries = last ? p->wanted : n;
        /* Every worker normalises all rows for itself: cheaper than to wait for the others. */
        for (int64_t t = 0; t < n; t++) normalise(m, x + t * Cp, layer->gain1, layer->shift1, own + t * Cp);
        linear(me, m, &layer->key_value, 0, n, own, Cp, kv, 2 * HD, 0, 0, room);
        if (last)
            for (int64_t i = 0; i < queries; i++) memmove(own + i * Cp, own + p->want[i] * Cp, Cp * sizeof(float));
        linear(me, m, &layer->query, 0, queries, own, Cp, q, HD, 0, 0, room);
        barrier(me);
        if (last && me->number == 0)
            for (int64_t i = 0; i < queries; i++) memmove(x + i * Cp, x + p->want[i] * Cp, Cp * sizeof(float));
        share(me, p->B * m->H, &from, &to);
        for (int64_t unit = from, i = 0, row = 0; unit < to; unit++) {
            if (unit == from || unit / m->H != row) { /* this row's queries */
                row = unit / m->H;
                if (!last)
                    i = p->begin[row];
                else
                    for (i = 0; i < queries && p->want[i] < p->begin[row];) i++;
            }
            int64_t end = i;
            if (!last)
                end = p->begin[row + 1];
            else
                while (end < queries && p->want[end] < p->begin[row + 1]) end++;
            attend(m, p, l, row, unit % m->H, i, end, last ? p->want : 0, q, kv, y, scores);
        }
        barrier(me);
        n = queries;
        linear(me, m, &layer->project, 0, n, y, HD, x, Cp, 1, 0, room);
        barrier(me);
        for (int64_t t = 0; t < n; t++) normalise(m, x + t * Cp, layer->gain2, layer->shift2, own + t * Cp);
        linear(me, m, &layer->up, layer->gate.weights ? &layer->gate : 0, n, own, Cp, h, F, 0, 1, room);
        barrier(me);
        linear(me, m, &layer->down, 0, n, h, F, x, Cp, 1, 0, room);
        barrier(me);
    }
    int compact = n == p->wanted; /* the last layer has left only the wanted ones */
    for (int64_t i = 0; i < p->wanted; i++)
        normalise(m, x + (compact ? i : p->want[i]) * Cp, m->gain, m->shift, own + i * Cp);
    linear(me, m, &m->head, 0, p->wanted, own, Cp, p->logits, m->Vp, 0, 0, room);
    barrier(me);
    if (!chooses) return;
    share(me, p->B, &from, &to);
    for (int64_t row = from; row < to; row++) {
        if (p->walk) mask(p->walk, row, m->V, p->logits + row * m->Vp);
        p->chosen[row] = choose(p->logits + row * m->Vp, m->V, p->how, p->uniforms ? p->uniforms[row] : 0,
                                (double *)for_choice, (struct candidate *)(for_choice + 2 * m->Vp));
    }
    barrier(me);
}

/* Multiplications of one character, but for attention's. */
static int64_t work_of(const struct model *m) {
    return m->n_layer * m->C * (4 * m->H * m->Dp + 2 * hidden(m)) + m->C * m->Vp;
}

/* Read p->n characters and write the logits that are wanted. */
void charlm_pass(const struct model *m, const struct pass *p) {
    run_together(run, m, p, p->threads, p->n * work_of(m));
}

/* A row goes on by the id that was chosen for it. */
static void go_on(const struct model *m, const struct pass *p, int64_t row, int64_t id) {
    int64_t *before = p->before + row * m->earlier;
    if (m->earlier) {
        memmove(before + 1, before, (m->earlier - 1) * sizeof(int64_t));
        before[0] = p->id[row];
    }
    p->id[row] = id;
    p->position[row]++;
}

/* Up to `turns` times: read an id of each row, the only one of it in this pass, and choose the next, which takes
   its place; positions move on by one. `uniforms` and `chosen` are (turns, B). Returns how many turns were made:
   fewer if none can be chosen in a row, which then has -1, or if a text in `walk`, which may be NULL, is at its end. */
int64_t charlm_turns(const struct model *m, const struct pass *p, const struct choice *how, struct walk *walk,
                     const double *uniforms, int64_t turns, int64_t *chosen) {
    for (int64_t turn = 0; turn < turns; turn++) {
        struct pass one = *p;
        one.how = how;
        one.walk = walk;
        one.uniforms = uniforms ? uniforms + turn * p->B : 0;
        one.chosen = chosen + turn * p->B;
        charlm_pass(m, &one);
        for (int64_t row = 0; row < p->B; row++)
            if (one.chosen[row] < 0) return turn;
        for (int64_t row = 0; row < p->B; row++) go_on(m, p, row, one.chosen[row]);
        if (walk && move(walk, p->B, one.chosen)) return turn + 1;
    }
    return turns;
}

/* The same for a mixture with an n-gram model: `texts` are the rows' ids, `lengths` how many each has. `work` is
   room for 8 V floats. */
int64_t charlm_mixed_turns(const struct model *m, const struct pass *p, const struct ngrams *g, const float *weights,
                           int64_t *const *texts, const int64_t *lengths, const struct choice *how,
                           struct walk *walk, const double *uniforms, int64_t turns, int64_t *chosen, float *work) {
    int64_t V = m->V, strides[2] = {m->Vp, V};
    float *counted = work, *p_each = work + V, *mixed = work + 3 * V;
    double *weight = (double *)(work + 4 * V);
    for (int64_t turn = 0; turn < turns; turn++) {
        int64_t *ids = chosen + turn * p->B;
        charlm_pass(m, p);
        for (int64_t row = 0; row < p->B; row++) {
            const float *said[2] = {p->logits + row * m->Vp, counted};
            int64_t n = lengths[row] + turn;
            charlm_ngrams(g, texts[row], n, n + 1, counted);
            charlm_mix(2, 1, V, said, strides, weights, p_each, mixed);
            if (walk) mask(walk, row, V, mixed);
            ids[row] = choose(mixed, V, how, uniforms ? uniforms[turn * p->B + row] : 0, weight,
                              (struct candidate *)(weight + V));
            if (ids[row] < 0) return turn;
        }
        for (int64_t row = 0; row < p->B; row++) {
            texts[row][lengths[row] + turn] = ids[row];
            go_on(m, p, row, ids[row]);
        }
        if (walk && move(walk, p->B, ids)) return turn + 1;
    }
    return turns;
}

/* A digest of some memory, by which a change of weights is noticed: four streams of multiply and add. */
uint64_t charlm_digest(const unsigned char *bytes, int64_t count) {
    uint64_t h[4] = {1, 2, 3, 4}, words[4], sum = (uint64_t)count;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        memcpy(words, bytes + i, 32);
        for (int l = 0; l < 4; l++) {
            h[l] = (h[l] ^ words[l]) * 0x9E3779B97F4A7C15u;
            h[l] ^= h[l] >> 29;
        }
    }
    for (; i < count; i++) h[0] = (h[0] ^ bytes[i]) * 0x9E3779B97F4A7C15u;
    for (int l = 0; l < 4; l++) sum = (sum ^ h[l]) * 0x9E3779B97F4A7C15u;
    return sum;
}
