/* What `MixtureLM.forward` says, from what its members say. */

#include <math.h>
#include <stdint.h>

#define MEMBERS 6  /* at most */
#define PLACES 729 /* of the gate: 3 to that */
#define TINY 1.17549435e-38f

/* Log-probabilities (n, V) of a mixture of K models, from their logits; `strides` are floats from row to row.
   `weights` is (3 ** K, K + 1), `p` room for (K, V). */
void charlm_mix(int64_t K, int64_t n, int64_t V, const float *const *logits, const int64_t *strides,
                const float *weights, float *p, float *out) {
    for (int64_t row = 0; row < n; row++, out += V) {
        float nearness[PLACES], weight[MEMBERS + 1] = {0}, log_total[MEMBERS], shift = 0;
        int64_t places = 1;
        nearness[0] = 1;
        for (int64_t k = 0; k < K; k++) {
            const float *z = logits[k] + row * strides[k];
            float top = z[0];
            double total = 0;
            for (int64_t i = 1; i < V; i++) top = z[i] > top || isnan(z[i]) ? z[i] : top;
            for (int64_t i = 0; i < V; i++) total += p[k * V + i] = expf(z[i] - top);
            for (int64_t i = 0; i < V; i++) p[k * V + i] *= (float)(1 / total);
            log_total[k] = top + (float)log(total);
            float sure = (float)(1 / total), low = sure < 0.5f ? 1 - 2 * sure : 0, high = sure > 0.5f ? 2 * sure - 1 : 0;
            for (int64_t j = places; j-- > 0;) {
                nearness[3 * j + 2] = nearness[j] * high;
                nearness[3 * j + 1] = nearness[j] * (1 - low - high);
                nearness[3 * j] = nearness[j] * low;
            }
            places *= 3;
        }
        for (int64_t j = 0; j < places; j++)
            for (int64_t k = 0; k <= K; k++) weight[k] += nearness[j] * weights[j * (K + 1) + k];
        /* The geometric mean, first without what makes it sum to one. */
        double total = 0;
        for (int64_t k = 0; k < K; k++) shift += log_total[k];
        for (int64_t i = 0; i < V; i++) {
            float sum = 0;
            for (int64_t k = 0; k < K; k++) sum += logits[k][row * strides[k] + i];
            total += out[i] = expf((sum - shift) / K);
        }
        for (int64_t i = 0; i < V; i++) {
            float sum = (float)(weight[K] / total) * out[i];
            for (int64_t k = 0; k < K; k++) sum += weight[k] * p[k * V + i];
            out[i] = logf(sum < TINY ? TINY : sum);
        }
    }
}
