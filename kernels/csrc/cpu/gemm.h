// The one product of matrices that all the others are made of, on words of 32 bits: a float, or a pair of bf16
// neighbours along the summed dimension. A sum over the columns of W takes pairs as they lie (`pack`, `load_words`),
// one over its rows pairs them across two rows (`across_rows`).

struct FloatWords {
    static constexpr int WIDTH = 1;  // elements in a word

    FQA_INLINE Floats multiply_add(float a, Floats b, Floats c) { return broadcast(a) * b + c; }

    // `count` floats as words.
    static void pack(const float* x, int64_t count, float* words) { __builtin_memcpy(words, x, count * sizeof(float)); }

    // One row of a matrix as words.
    static void load_words(const Matrix& matrix, int64_t row, int64_t count, float* words) {
        load_row(matrix, row, 0, count, words);
    }

    // Words for a sum over rows, of LANES columns of packed rows WIDTH * `row` and following, which lie `stride` words
    // apart.
    FQA_INLINE Floats across_rows(const float* words, int64_t row, int64_t stride, int64_t column) {
        return load(words + row * stride + column);
    }

    // The same of WIDTH rows of floats in registers.
    FQA_INLINE Floats across_rows(const Floats* rows) { return rows[0]; }
};

#if defined(FQA_BF16_DOT)
struct Bf16Pairs {
    static constexpr int WIDTH = 2;

    FQA_INLINE Floats multiply_add(float a, Floats b, Floats c) {
        const __m512i pair = _mm512_set1_epi32(bit_cast<int32_t>(a));
        return bit_cast<Floats>(_mm512_dpbf16_ps(bit_cast<__m512>(c), bit_cast<__m512bh>(pair), bit_cast<__m512bh>(b)));
    }

    static void pack(const float* x, int64_t count, float* words) {
        Bf16* elements = reinterpret_cast<Bf16*>(words);
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) store(elements + i, load(x + i));
        if (i < count) store_first(elements + i, count - i, load_first(x + i, count - i, 0.0f));
        if (count % 2 != 0) write(elements + count, Bf16{0});
    }

    static void load_words(const Matrix& matrix, int64_t row, int64_t count, float* words) {
        const Bf16* source = static_cast<const Bf16*>(matrix.data) + row * matrix.row_stride;
        Bf16* elements = reinterpret_cast<Bf16*>(words);
        if (matrix.column_stride == 1)
            __builtin_memcpy(elements, source, count * sizeof(Bf16));
        else
            for (int64_t i = 0; i < count; ++i) write(elements + i, source[i * matrix.column_stride]);
        if (count % 2 != 0) write(elements + count, Bf16{0});
    }

    // Two rows, each element of the first below that of the second.
    FQA_INLINE Floats across_rows(const float* words, int64_t pair, int64_t stride, int64_t column) {
        const Bf16* first = reinterpret_cast<const Bf16*>(words + 2 * pair * stride) + column;
        const Bf16* second = first + 2 * stride;
        const Words low = __builtin_convertvector(read<Shorts>(first), Words);
        return bit_cast<Floats>(low | (__builtin_convertvector(read<Shorts>(second), Words) << 16));
    }

    FQA_INLINE Floats across_rows(const Floats* rows) {
        return bit_cast<Floats>(bf16_bits(rows[0]) | (bf16_bits(rows[1]) << 16));
    }
};
#endif

// The accumulators of one call fill the registers: 16 of 32 (AVX-512), 12 of 16 (AVX2), 8 of 16. On a Zen 5 core
// 12 x 2, 8 x 3 and 6 x 4 of AVX-512 are no faster than 8 x 2: 525 GF/s in bf16, 255 in fp32.
constexpr int GEMM_ROWS = LANES == 16 ? 8 : 4;
constexpr int GEMM_VECTORS = LANES == 8 ? 3 : 2;
constexpr int PANEL = GEMM_VECTORS * LANES;

// C (GEMM_ROWS, VECTORS * LANES) = or += A (GEMM_ROWS, words) B (words, the first columns of PANEL); rows of C and of
// A, and words of A, lie as far apart as told.
template <class Arithmetic, int VECTORS>
static void multiply_columns(int64_t words, const float* a, int64_t a_row_stride, int64_t a_word_stride, const float* b,
                             float* c, int64_t c_row_stride, bool add) {
    Floats sums[GEMM_ROWS][VECTORS] = {};
    for (int64_t k = 0; k < words; ++k) {
        Floats panel[VECTORS];
        FQA_UNROLL
        for (int n = 0; n < VECTORS; ++n) panel[n] = load(b + k * PANEL + n * LANES);
        FQA_UNROLL
        for (int m = 0; m < GEMM_ROWS; ++m) {
            const float word = a[m * a_row_stride + k * a_word_stride];
            FQA_UNROLL
            for (int n = 0; n < VECTORS; ++n) sums[m][n] = Arithmetic::multiply_add(word, panel[n], sums[m][n]);
        }
    }
    FQA_UNROLL
    for (int m = 0; m < GEMM_ROWS; ++m) {
        FQA_UNROLL
        for (int n = 0; n < VECTORS; ++n) {
            float* out = c + m * c_row_stride + n * LANES;
            store(out, add ? load(out) + sums[m][n] : sums[m][n]);
        }
    }
}

// The same of the first `columns` of a panel at least.
template <class Arithmetic>
static void multiply_panel(int64_t words, const float* a, int64_t a_row_stride, int64_t a_word_stride, const float* b,
                           float* c, int64_t c_row_stride, bool add, int64_t columns = PANEL) {
    const auto multiply =
        columns <= LANES ? multiply_columns<Arithmetic, 1> : multiply_columns<Arithmetic, GEMM_VECTORS>;
    multiply(words, a, a_row_stride, a_word_stride, b, c, c_row_stride, add);
}
