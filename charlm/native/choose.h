/* The choice of an id from logits: what `SamplingOptions.filter` and `sample` do, in a few microseconds. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

struct choice {
    double temperature, top_p, min_p; /* temperature 0: the likeliest; top_p 1 and min_p 0: all */
    int64_t top_k;                    /* V or more: all */
};
/* Where the texts of B rows stand in an `Automaton` of S states. */
struct walk {
    const int32_t *column;   /* (V,) */
    const int32_t *next;     /* (S, K): -1 where no text that matches goes on so */
    const int32_t *distance; /* (S,): how many ids are missing at least */
    int64_t K, left, ends;   /* left: how many ids each text may still get; ends: how many have ended or get no more */
    int32_t *state;          /* (B,); -1: ended by the last id, which is no part of it */
};
struct candidate {
    float logit;
    int32_t id;
};

/* Whether a text in state `from` may go on by an id of some column. */
static int goes_on(const struct walk *w, int32_t from, int64_t column, int64_t left) {
    int32_t to = w->next[from * w->K + column];
    return to >= 0 && w->distance[to] < left;
}

/* Make impossible what a row may not go on by, unless it may end. */
static void mask(const struct walk *w, int64_t row, int64_t V, float *logits) {
    int32_t from = w->state[row];
    if (w->distance[from] == 0) return;
    for (int64_t i = 0; i < V; i++)
        if (!goes_on(w, from, w->column[i], w->left)) logits[i] = -INFINITY;
}

/* Move on by an id of each of B rows; returns w->ends. */
static int64_t move(struct walk *w, int64_t B, const int64_t *ids) {
    w->ends = 0;
    for (int64_t row = 0; row < B; row++) {
        int32_t *state = w->state + row;
        int64_t column = w->column[ids[row]], k = 0;
        *state = goes_on(w, *state, column, w->left) ? w->next[*state * w->K + column] : -1;
        while (*state >= 0 && k < w->K && !goes_on(w, *state, k, w->left - 1)) k++;
        w->ends += *state < 0 || k == w->K;
    }
    w->left--;
    return w->ends;
}

static int likelier(const void *a, const void *b) {
    const struct candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id - y->id;
}

/* For one row; -1 where there is nothing to choose from. */
static int64_t choose(const float *logits, int64_t V, const struct choice *how, double uniform, double *weight,
                      struct candidate *sorted) {
    int64_t best = 0, chosen = -1;
    for (int64_t i = 0; i < V; i++) {
        if (isnan(logits[i])) return -1;
        if (logits[i] > logits[best]) best = i;
    }
    if (!isfinite(logits[best])) return -1;
    if (how->temperature == 0) return best;
    float temperature = (float)how->temperature, top = logits[best] / temperature;
    for (int64_t i = 0; i < V; i++) weight[i] = exp((double)(logits[i] / temperature) - top);
    if (how->top_k < V || how->top_p < 1) {
        double total = 0, before = 0;
        int64_t kept = how->top_k < V ? how->top_k : V;
        for (int64_t i = 0; i < V; i++) sorted[i] = (struct candidate){logits[i] / temperature, (int32_t)i};
        qsort(sorted, V, sizeof *sorted, likelier);
        for (int64_t i = kept; i < V; i++) weight[sorted[i].id] = 0;
        for (int64_t i = 0; i < kept; i++) total += weight[sorted[i].id];
        for (int64_t i = 0; i < kept && how->top_p < 1; i++) {
            double one = weight[sorted[i].id];
            if (i && before >= how->top_p * total) weight[sorted[i].id] = 0;
            before += one;
        }
    }
    double total = 0, sum = 0;
    for (int64_t i = 0; i < V; i++) {
        if (weight[i] < how->min_p) weight[i] = 0; /* the likeliest one's is 1 */
        total += weight[i];
    }
    for (int64_t i = 0; i < V; i++) {
        if (weight[i] > 0) chosen = i;
        sum += weight[i];
        if (sum > uniform * total) break;
    }
    return chosen;
}

/* Choose an id for each of B rows of logits; returns -1, or the first row in which none can be chosen. `walk` may be
   NULL; else it moves on, and the logits are changed. */
int64_t charlm_choose(float *logits, int64_t B, int64_t V, int64_t stride, const struct choice *how,
                      struct walk *walk, const double *uniforms, int64_t *chosen, double *weight, struct candidate *sorted) {
    for (int64_t row = 0; row < B; row++) {
        if (walk) mask(walk, row, V, logits + row * stride);
        int64_t id = choose(logits + row * stride, V, how, uniforms ? uniforms[row] : 0, weight, sorted);
        if (id < 0) return row;
        chosen[row] = id;
    }
    if (walk) move(walk, B, chosen);
    return -1;
}
