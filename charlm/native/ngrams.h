/* What `NGramLM.forward` says, from its tables as they lie in memory. */

#include <math.h>
#include <stdint.h>

struct ngrams {
    int64_t V, M, order;
    const int64_t *codes;   /* (M,) increasing: parent's number * V + id; nodes are numbered from 1 */
    const int32_t *counts;  /* (M,) */
    const float *discounts; /* (order, 3) */
};

/* The first place from which codes are at least `code`. */
static int64_t place_of(const struct ngrams *g, int64_t code) {
    int64_t low = 0, length = g->M;
    while (length > 0) {
        int64_t half = length / 2;
        int below = g->codes[low + half] < code;
        low = below ? low + half + 1 : low;
        length = below ? length - half - 1 : half;
    }
    return low;
}

/* Mix into p (V,) what the counts behind a node say. */
static void mix(const struct ngrams *g, int64_t node, int64_t length, float *p) {
    int64_t first = place_of(g, node * g->V), end = first, total = 0, kinds[3] = {0};
    /* The lower bound, too: nobody may have checked that the codes increase. */
    for (; end < g->M && g->codes[end] >= node * g->V && g->codes[end] < (node + 1) * g->V; end++) {
        int32_t count = g->counts[end];
        total += count;
        kinds[count < 2 ? 0 : count < 3 ? 1 : 2]++;
    }
    if (total <= 0) return;
    const float *d = g->discounts + 3 * length;
    float taken = (kinds[0] * d[0] + kinds[1] * d[1] + kinds[2] * d[2]) / total;
    for (int64_t i = 0; i < g->V; i++) p[i] *= taken;
    for (int64_t at = first; at < end; at++) {
        int32_t count = g->counts[at];
        p[g->codes[at] - node * g->V] += (count - d[count < 2 ? 0 : count < 3 ? 1 : 2]) / total;
    }
}

/* Log-probabilities (to - from, V) of the ids at positions from ... to - 1 of a row. */
void charlm_ngrams(const struct ngrams *g, const int64_t *ids, int64_t from, int64_t to, float *out) {
    for (int64_t position = from; position < to; position++, out += g->V) {
        for (int64_t i = 0; i < g->V; i++) out[i] = 1.0f / g->V;
        for (int64_t length = 0; length < g->order && length <= position; length++) {
            int64_t node = 0;
            for (int64_t i = position - length; i < position && node >= 0; i++) {
                int64_t code = node * g->V + ids[i], at = place_of(g, code);
                node = at < g->M && g->codes[at] == code ? at + 1 : -1;
            }
            if (node < 0) break; /* a longer context did not occur either */
            mix(g, node, length, out);
        }
        for (int64_t i = 0; i < g->V; i++) out[i] = logf(out[i] > 1.17549435e-38f ? out[i] : 1.17549435e-38f);
    }
}
