/* Blocks of text in the predictions of an n-gram model, many characters at a call: `charlm.compression.ngram_blocks`
   calls it, in the portable build. It computes the same as `portable.frequencies`, `Decoder.target` and `Decoder.take`
   there, bit for bit. */

#define MOST_FREQUENCY ((int64_t)1 << 30)

struct decoder {
    uint64_t code, range;
    const uint8_t *bytes;
    int64_t size, at;           /* of the bytes, and of the next one */
    int64_t may, read, escaped; /* of unknown characters: whether there may be any, and out of how many so far */
    int64_t total;              /* of the frequencies of the known ids, at the last position */
};

/* Integer frequencies (V,) of logits, and their sum; 0 if the logits are not finite. */
static int64_t frequencies(int64_t V, const float *logits, int64_t *f) {
    double top = logits[0];
    int64_t sum = 0, total = 0;
    for (int64_t i = 0; i < V; i++) {
        if (isnan(logits[i])) return 0;
        top = logits[i] > top ? logits[i] : top;
    }
    if (!isfinite(top)) return 0;
    for (int64_t i = 0; i < V; i++) sum += f[i] = (int64_t)(exp(logits[i] - top) * 4294967296.0);
    for (int64_t i = 0; i < V; i++) total += f[i] = 1 + f[i] * MOST_FREQUENCY / sum;
    return total;
}

/* Where the share of each id at the positions from ... to - 1 of a text begins, its size, and the total: out (to - from,
   3); behind the end of the text stands the total alone. Returns 0 if a prediction is not finite. `logits` and `f`
   are room for (V,). */
int64_t charlm_ngram_shares(const struct ngrams *g, const int64_t *ids, int64_t length, int64_t from, int64_t to,
                            float *logits, int64_t *f, int64_t *out) {
    for (int64_t position = from; position < to; position++, out += 3) {
        charlm_ngrams(g, ids, position, position + 1, logits);
        out[0] = out[1] = 0;
        if (!(out[2] = frequencies(g->V, logits, f))) return 0;
        if (position == length) continue;
        for (int64_t i = 0; i < ids[position]; i++) out[0] += f[i];
        out[1] = f[ids[position]];
    }
    return 1;
}

/* Decode the ids at the positions from ... to - 1 of a text, as long as they are known. Returns how many; -1 if a
   prediction is not finite. */
int64_t charlm_ngram_decode(const struct ngrams *g, int64_t *ids, int64_t from, int64_t to, float *logits, int64_t *f,
                            struct decoder *d) {
    for (int64_t position = from; position < to; position++) {
        charlm_ngrams(g, ids, position, position + 1, logits);
        if (!(d->total = frequencies(g->V, logits, f))) return -1;
        int64_t all = d->total + d->may * (1 + MOST_FREQUENCY * d->escaped / (d->read + 1)), start = 0, id = 0;
        uint64_t unit = d->range / all, target = d->code / unit;
        if (target >= (uint64_t)d->total) {
            if (d->may) return position - from; /* an unknown character */
            target = d->total - 1;              /* the bytes are damaged */
        }
        while (start + f[id] <= (int64_t)target) start += f[id++];
        ids[position] = id;
        d->read++;
        d->code -= unit * start;
        d->range = unit * f[id];
        while (d->range < (uint64_t)1 << 56) {
            d->code = d->code << 8 | (d->at < d->size ? d->bytes[d->at] : 0);
            d->at++;
            d->range <<= 8;
        }
    }
    return to - from;
}
