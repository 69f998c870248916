// Vectors of FQA_LANES floats, as GCC and Clang have them on every processor, and the three dtypes in memory.
//
// Included by level.cpp alone, inside the namespace of its level: a function of the same name compiled for another
// level would be another function, and the linker keeps only one of those that have one name.

constexpr int LANES = FQA_LANES;

typedef float Floats __attribute__((vector_size(4 * FQA_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * FQA_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * FQA_LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * FQA_LANES)));

#define FQA_INLINE static inline __attribute__((always_inline))
#define FQA_UNROLL _Pragma("GCC unroll 16")

constexpr float INFINITE = __builtin_inff();
constexpr float NOT_A_NUMBER = __builtin_nanf("");

template <class To, class From>
FQA_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

template <class T>
FQA_INLINE T read(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof(T));
    return value;
}

template <class T>
FQA_INLINE void write(void* p, T value) {
    __builtin_memcpy(p, &value, sizeof(T));
}

FQA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FQA_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FQA_INLINE int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

FQA_INLINE Floats broadcast(float x) { return Floats{} + x; }
FQA_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

FQA_INLINE bool any(Ints mask) {
    int32_t found = 0;
    for (int lane = 0; lane < LANES; ++lane) found |= mask[lane];
    return found != 0;
}

FQA_INLINE float sum(Floats x) {
    float total = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
}

FQA_INLINE float maximum(Floats x) {
    float most = x[0];
    for (int lane = 1; lane < LANES; ++lane) most = x[lane] > most ? x[lane] : most;
    return most;
}

// --- the dtypes in memory --------------------------------------------------------------------------------------------

struct Bf16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

// bf16 is the upper half of a float.
FQA_INLINE Floats widen(Shorts bits, Bf16) { return bit_cast<Floats>(__builtin_convertvector(bits, Words) << 16); }

// To the nearest, ties to even. A NaN keeps its sign, and one of its bits is set so that it stays a NaN.
FQA_INLINE Words bf16_bits(Floats x) {
    const Words bits = bit_cast<Words>(x);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return x == x ? rounded : (bits >> 16) | 0x40u;
}

FQA_INLINE Shorts narrow(Floats x, Bf16) { return __builtin_convertvector(bf16_bits(x), Shorts); }

// The exponent has 5 bits of bias 15 instead of 8 of bias 127; the product with 2^112 corrects it, for subnormals too.
FQA_INLINE Floats widen(Shorts half, Half) {
    const Words bits = __builtin_convertvector(half, Words);
    const Words magnitude = (bits & 0x7fffu) << 13;
    const Words scaled = bit_cast<Words>(bit_cast<Floats>(magnitude) * 0x1p112f);
    const Words special = magnitude | 0x7f800000u;  // infinity or NaN
    return bit_cast<Floats>(((bits & 0x8000u) << 16) | (magnitude < 0x0f800000u ? scaled : special));
}

FQA_INLINE Shorts narrow(Floats x, Half) {
    const Words bits = bit_cast<Words>(x);
    const Words sign = (bits >> 16) & 0x8000u;
    const Words magnitude = bits & 0x7fffffffu;
    const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // 0.5 has the spacing of half's subnormals: the addition rounds.
    const Words subnormal = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
    const Words special = magnitude > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
    const Words half = magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? subnormal : normal);
    return __builtin_convertvector(sign | half, Shorts);
}

FQA_INLINE Floats load(const float* p) { return read<Floats>(p); }
FQA_INLINE Floats load(const Bf16* p) { return widen(read<Shorts>(p), Bf16{}); }
FQA_INLINE Floats load(const Half* p) { return widen(read<Shorts>(p), Half{}); }

FQA_INLINE void store(float* p, Floats x) { write(p, x); }
FQA_INLINE void store(Bf16* p, Floats x) { write(p, narrow(x, Bf16{})); }
FQA_INLINE void store(Half* p, Floats x) { write(p, narrow(x, Half{})); }

// The first `count` <= LANES elements; the other lanes are `rest`.
template <class T>
FQA_INLINE Floats load_first(const T* p, int64_t count, float rest) {
    if (count == LANES) return load(p);
    T elements[LANES] = {};
    __builtin_memcpy(elements, p, count * sizeof(T));
    Floats x = load(elements);
    for (int lane = 0; lane < LANES; ++lane) x[lane] = lane < count ? x[lane] : rest;
    return x;
}

template <class T>
FQA_INLINE void store_first(T* p, int64_t count, Floats x) {
    if (count == LANES) return store(p, x);
    T elements[LANES];
    store(elements, x);
    __builtin_memcpy(p, elements, count * sizeof(T));
}

// f(T()) with the type of `dtype` in memory.
template <class F>
FQA_INLINE void with_type(Dtype dtype, F f) {
    if (dtype == Dtype::float32) f(float{});
    if (dtype == Dtype::bfloat16) f(Bf16{});
    if (dtype == Dtype::float16) f(Half{});
}

// Elements [first, first + count) of a row as floats; zeros up to a multiple of LANES.
FQA_INLINE void load_row(const Matrix& matrix, int64_t row, int64_t first, int64_t count, float* out) {
    with_type(matrix.dtype, [&](auto zero) {
        using T = decltype(zero);
        const T* p = static_cast<const T*>(matrix.data) + row * matrix.row_stride + first * matrix.column_stride;
        const int64_t step = matrix.column_stride;
        for (int64_t i = 0; i < count; i += LANES) {
            const int64_t found = smaller(LANES, count - i);
            T elements[LANES] = {};
            if (step != 1)
                for (int64_t lane = 0; lane < found; ++lane) elements[lane] = p[(i + lane) * step];
            store(out + i, step == 1 ? load_first(p + i, found, 0.0f) : load(elements));
        }
    });
}

// `count` floats as elements [first, first + count) of a row of `dtype`.
FQA_INLINE void store_row(void* row, Dtype dtype, int64_t first, int64_t count, const float* x) {
    with_type(dtype, [&](auto zero) {
        decltype(zero)* out = static_cast<decltype(zero)*>(row) + first;
        for (int64_t i = 0; i < count; i += LANES) store_first(out + i, smaller(LANES, count - i), load(x + i));
    });
}
