// exp and tanh of vectors. Polynomials by the Remez algorithm, in float64, of the ranges named.

FQA_INLINE Floats polynomial(Floats x, float c0, float c1, float c2, float c3, float c4) {
    return (((c4 * x + c3) * x + c2) * x + c1) * x + c0;
}

// e^x to about 1 unit in the last place. Below e^-87.3365, the smallest normal number, 0: a subnormal weight in a sum
// whose largest is 1 cannot be seen.
FQA_INLINE Floats exp(Floats x) {
    // n = x / ln 2 to the nearest integer: adding 1.5 * 2^23 rounds, and leaves n in the lowest bits.
    const Floats shifted = x * 1.44269504088896341f + 0x1.8p23f;
    const Floats n = shifted - 0x1.8p23f;
    // ln 2 in two parts, the first short enough for n times it to be exact.
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440054690583e-4f;
    // |r| <= ln 2 / 2: the polynomial of (e^r - 1 - r) / r^2 is off by 1.1e-8 of e^r.
    const Floats p =
        polynomial(r, 0.5f, 0.16666576266288757f, 0.04166637361049652f, 0.008363205008208752f, 0.0013941165525466204f);
    const Floats mantissa = (r * r * p + r) + 1.0f;
    const Floats scaled = bit_cast<Floats>(bit_cast<Words>(mantissa) + (bit_cast<Words>(shifted) << 23));
    const Floats bounded = x > 88.72283f ? broadcast(INFINITE) : (x < -87.3365f ? broadcast(0.0f) : scaled);
    return x == x ? bounded : x;
}

// tanh x to about 2 units in the last place.
FQA_INLINE Floats tanh(Floats x) {
    const Floats magnitude = bit_cast<Floats>(bit_cast<Words>(x) & 0x7fffffffu);
    const Floats square = x * x;
    // |x| < 0.625: the polynomial of (tanh x - x) / x^3 is off by 1.8e-8 of tanh x.
    const Floats small = polynomial(square, -0.333333283662796f, 0.13332794606685638f, -0.0538540743291378f,
                                    0.02101009525358677f, -0.006113206967711449f) *
                             square * x +
                         x;
    const Floats large = 1.0f - 2.0f / (exp(2.0f * magnitude) + 1.0f);
    const Words sign = bit_cast<Words>(x) & 0x80000000u;
    return magnitude < 0.625f ? small : bit_cast<Floats>(bit_cast<Words>(large) | sign);
}
