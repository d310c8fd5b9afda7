/* Dirichlet weights of each row, a softmax of logarithms of Gamma variables: fastmix/_torch/dirichlet.py draws the same. */
#include "draws.h"

/* Writes weights [rows, ways] of Dirichlet(alpha), or [rows, 1 + ways] behind the share of the clean batch where skip is (a, b). */
FASTMIX_EXPORT void fm_dirichlet(
    const int64_t *state, int64_t rows, int64_t ways, double alpha, const double *skip, double *weights) {
    fm_source source = fm_source_of(state);
    for (int64_t row = 0; row < rows; row++) {
        double most = -INFINITY, sum = 0, mixed = 1;
        if (skip) fm_uneven_beta(&source, FM_SKIP, 0, row, skip[0], skip[1], &mixed, weights++);
        for (int64_t k = 0; k < ways; k++) {
            weights[k] = fm_log_gamma(&source, FM_WAYS, 0, row * ways + k, alpha);
            most = weights[k] > most ? weights[k] : most;
        }
        for (int64_t k = 0; k < ways; k++) sum += weights[k] = fm_short_one(exp(weights[k] - most));
        for (int64_t k = 0; k < ways; k++) weights[k] = mixed * (weights[k] / sum);
        weights += ways;
    }
}
