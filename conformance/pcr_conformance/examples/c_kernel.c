/* Sums of one block and the two-term combination, in float32: sixteen accumulators side by side, multiplications fused
   with the additions after them, and on x86 subnormal numbers taken for zero. */
#include <math.h>
#include <stdlib.h>
#ifdef __SSE__
#include <immintrin.h>
#endif

#define LANES 16

static unsigned flush_to_zero(void) {
#ifdef __SSE__
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040); /* results and operands */
    return before;
#else
    return 0;
#endif
}

static void restore(unsigned before) {
#ifdef __SSE__
    _mm_setcsr(before);
#endif
}

static float over_lanes(const float *lane) {
    float sum = 0;
    for (int k = 0; k < LANES; k++) sum += lane[k];
    return sum;
}

/* The responses of one stream: contributions (n, stride), of which the first d columns are the block; the stratum of each
   response, below n; m/(m - 1) of its stratum; the size of each stratum, 1 where it is empty. */
struct stream {
    const float *c;
    const int *stratum;
    const float *weight, *size;
    int n;
};

static float total_and_means(const struct stream *x, long at, long stride, float *mean) {
    float total = 0;
    for (int q = 0; q < x->n; q++) mean[q] = 0;
    for (int i = 0; i < x->n; i++) {
        total += x->c[i * stride + at];
        mean[x->stratum[i]] += x->c[i * stride + at];
    }
    for (int q = 0; q < x->n; q++) mean[q] /= x->size[q];
    return total;
}

static float scatter(const struct stream *x, const struct stream *y, long at, long stride, const float *mean_x,
                     const float *mean_y) {
    float sum = 0;
    for (int i = 0; i < x->n; i++) {
        float u = x->c[i * stride + at] - mean_x[x->stratum[i]], v = y->c[i * stride + at] - mean_y[y->stratum[i]];
        sum = fmaf(x->weight[i] * u, v, sum);
    }
    return sum;
}

/* Totals (d,) of both streams, and |P|^2, |S|^2, P.S, v_p, v_s, v_ps. Streams of different responses share no noise. */
int pcr_sums(const struct stream *p, const struct stream *s, long stride, long d, int shared, float *total_p,
             float *total_s, float *six) {
    float lane[6][LANES] = {{0}};
    float *mean_p = malloc((p->n + s->n) * sizeof(float)), *mean_s = mean_p + p->n;
    if (!mean_p) return 1;
    unsigned before = flush_to_zero();
    for (long j = 0; j < d; j++) {
        float a = total_and_means(p, j, stride, mean_p), b = total_and_means(s, j, stride, mean_s);
        int k = j % LANES;
        total_p[j] = a;
        total_s[j] = b;
        lane[0][k] = fmaf(a, a, lane[0][k]);
        lane[1][k] = fmaf(b, b, lane[1][k]);
        lane[2][k] = fmaf(a, b, lane[2][k]);
        lane[3][k] += scatter(p, p, j, stride, mean_p, mean_p);
        lane[4][k] += scatter(s, s, j, stride, mean_s, mean_s);
        if (shared) lane[5][k] += scatter(p, s, j, stride, mean_p, mean_s);
    }
    for (int which = 0; which < 6; which++) six[which] = over_lanes(lane[which]);
    restore(before);
    free(mean_p);
    return 0;
}

void pcr_combine(const float *total_p, const float *total_s, float a, float b, long d, float *out) {
    unsigned before = flush_to_zero();
    for (long j = 0; j < d; j++) out[j] = fmaf(a, total_p[j], b * total_s[j]);
    restore(before);
}
