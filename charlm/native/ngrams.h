/* What `NGramLM.forward` says, from its tables as they lie in memory. */

#include <math.h>
#include <stdint.h>

struct ngrams {
    int64_t V, M, order, window, lengths, places;
    const int64_t *codes;   /* (M,) increasing: parent's number * V + id; nodes are numbered from 1 */
    const int32_t *counts;  /* (M,) */
    const float *discounts; /* (order, 3) */
    const float *shares;    /* (lengths, 3) */
    int64_t *place, *seen;  /* to work with: (places,); (V,) zeros, and zeros again afterwards */
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

/* Mix into p (V,) what followed at n places of the ids before, with three shares s. */
static void mix_window(const struct ngrams *g, const int64_t *ids, int64_t n, const float *s, float *p) {
    int64_t kinds[3] = {0};
    for (int64_t k = 0; k < n; k++) g->seen[ids[g->place[k] + 1]]++;
    for (int64_t k = 0; k < n; k++) {
        int64_t count = g->seen[ids[g->place[k] + 1]];
        kinds[count < 2 ? 0 : count < 3 ? 1 : 2]++;
    }
    float taken = (kinds[0] * s[0] + kinds[1] * s[1] + kinds[2] * s[2]) / n;
    for (int64_t i = 0; i < g->V; i++) p[i] *= taken;
    for (int64_t k = 0; k < n; k++) {
        int64_t id = ids[g->place[k] + 1], count = g->seen[id];
        p[id] += count * (1 - s[count < 2 ? 0 : count < 3 ? 1 : 2]) / n;
        g->seen[id] = 0;
    }
}

/* Log-probabilities (to - from, V) of the ids at positions from ... to - 1 of a row. */
void charlm_ngrams(const struct ngrams *g, const int64_t *ids, int64_t from, int64_t to, float *out) {
    for (int64_t position = from; position < to; position++, out += g->V) {
        for (int64_t i = 0; i < g->V; i++) out[i] = 1.0f / g->V;
        int64_t low = position > g->window ? position - g->window : 0, n = 0, counted = 1;
        for (int64_t at = position - 2; g->window && at >= low && n < g->places; at--)
            if (ids[at] == ids[position - 1]) g->place[n++] = at;
        for (int64_t length = 0; length <= position && (counted || n); length++) {
            if ((counted = counted && length < g->order)) {
                int64_t node = 0;
                for (int64_t i = position - length; i < position && node >= 0; i++) {
                    int64_t code = node * g->V + ids[i], at = place_of(g, code);
                    node = at < g->M && g->codes[at] == code ? at + 1 : -1;
                }
                if ((counted = node >= 0)) mix(g, node, length, out); /* else no longer one did occur */
            }
            if (length == 0) continue;
            int64_t same = 0;
            for (int64_t k = 0; k < n && length <= g->lengths; k++) {
                int64_t at = g->place[k] - length + 1;
                if (at >= low && ids[at] == ids[position - length]) g->place[same++] = g->place[k];
            }
            if ((n = same)) mix_window(g, ids, n, g->shares + 3 * (length - 1), out);
        }
        for (int64_t i = 0; i < g->V; i++) out[i] = logf(out[i] < 1.17549435e-38f ? 1.17549435e-38f : out[i]);
    }
}
