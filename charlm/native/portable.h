/* What makes a build with -DPORTABLE and -ffp-contract=off compute the same bits on every machine: it does without
   the C library's exp and log, and consists of operations alone that IEEE 754 rounds exactly (+, -, *, /, sqrt),
   each by itself and in a written order. `charlm.compression.portable` does the same in numpy, bit for bit: what is
   changed here is changed there, and `ARITHMETIC` goes up by one. */

#ifdef PORTABLE

#include <float.h>
#include <math.h>

#if FLT_EVAL_METHOD != 0 || defined(__FAST_MATH__)
#error "float must be computed as float, by the rules of IEEE 754"
#endif

/* Within a few units of the last place; 0 below -700, and of what is no number. */
static double portable_exp(double x) {
    static const double parts[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                                   1.0 / 362880.0,     1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,
                                   1.0 / 120.0,        1.0 / 24.0,        1.0 / 6.0,        0.5,
                                   1.0,                1.0};
    if (!(x > -700)) return 0;
    double n = floor(x * 1.4426950408889634 + 0.5), r = x - n * 0.693145751953125 - n * 1.4286068203094173e-06;
    double y = parts[0];
    for (int k = 1; k < 14; k++) y = y * r + parts[k];
    return ldexp(y, (int)n);
}

/* Of a number above 0. */
static double portable_log(double x) {
    int e;
    double m = frexp(x, &e);
    if (m < 0.7071067811865476) {
        m *= 2;
        e -= 1;
    }
    double s = (m - 1) / (m + 1), z = s * s, y = 1.0 / 23;
    for (int k = 21; k > 0; k -= 2) y = y * z + 1.0 / k;
    return 2 * s * y + e * 0.6931471805599453;
}

#define exp(x) portable_exp(x)
#define log(x) portable_log(x)
#define expf(x) ((float)portable_exp(x))
#define logf(x) ((float)portable_log(x))

#endif
