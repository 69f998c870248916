// v, lse(b) and e = dv/dhidden_q from hidden states, without logits over the whole vocabulary; see
// fastqadapter/ops/soft_value.py for the mathematics.
//
// Rows lie across the lanes of vectors: a tile of logits is (vocabulary, PANEL rows), and its maxima and sums are those
// of vectors, without a sum over lanes. The vocabulary is cut into parts, which threads take one by one. Each part has
// its own running softmax and its own e; they are added up in the end, in their order: results do not depend on threads.

constexpr int64_t PARTS = 8;
// Of the words of a tile of W: its two copies stay in a cache of 1 MB while all rows pass by.
constexpr int64_t TILE_WORDS = 36 * 1024;
constexpr int64_t MAX_TILE = 128;
// Scratch memory of one pass over the vocabulary, beside a tile for each thread; more rows take more passes.
constexpr int64_t SCRATCH_BYTES = 40 << 20;

// What all threads share in one pass over the vocabulary.
struct Pass {
    const SoftValueCall& call;
    bool with_base_lse = call.base_lse == nullptr;  // lse(b) is to be found
    // Base logits by a product of their own, else q + alpha_0 b by one product (identity 1).
    bool two_streams = with_base_lse || call.softcap != 0.0f;
    int64_t words = 0;        // of a row of hidden states or of W
    int64_t padded_size = 0;  // D, up to a multiple of PANEL
    int64_t word_stride = 0;  // of a row of W in a tile
    int64_t tile = 0;         // rows of W in a tile
    int64_t parts = 0;        // of the vocabulary
    int64_t first_row = 0;    // of the call
    int64_t rows = 0;
    int64_t padded_rows = 0;         // up to a multiple of PANEL
    float* hidden_b = nullptr;       // (padded_rows / PANEL, words, PANEL)
    float* hidden_q = nullptr;       // the same; with one stream d + alpha_0 h_b
    float* poison = nullptr;         // (2, padded_rows) of h_b and of d: NaN for a row with NaN or infinity, else 0
    float* statistics = nullptr;     // (parts, 4, padded_rows), see `Statistic`
    // (parts, padded_rows / PANEL, padded_size / PANEL, PANEL rows, PANEL columns), where e is wanted.
    float* expected = nullptr;
    float* workers = nullptr;        // (threads, scratch_of_worker)
    int64_t scratch_of_worker = 0;

    enum Statistic { SHIFT, TOTAL, BASE_SHIFT, BASE_TOTAL };

    float* of_part(int64_t part, Statistic which) const { return statistics + (4 * part + which) * padded_rows; }
    float* expected_of(int64_t part, int64_t row, int64_t column) const {
        const int64_t block = row / PANEL * PANEL, panel = column / PANEL * PANEL;
        return expected + (part * padded_rows + block) * padded_size + panel * PANEL + row % PANEL * PANEL + column % PANEL;
    }

    int64_t start_of(int64_t part) const {
        const int64_t tiles = (call.vocab + tile - 1) / tile;
        return smaller(part * tiles / parts * tile, call.vocab);
    }
};

// --- the rows of hidden states ----------------------------------------------------------------------------------------

// A row in the dtype of W, where the products of eager take it.
FQA_INLINE void round_to(Dtype dtype, float* row, int64_t count) {
    with_type(dtype, [&](auto zero) {
        decltype(zero) rounded[LANES];
        for (int64_t i = 0; i < count; i += LANES) {
            store(rounded, load(row + i));
            store(row + i, load(rounded));
        }
    });
}

template <class Arithmetic>
static void pack_hidden(const Pass& pass, int64_t block, int worker) {
    const SoftValueCall& call = pass.call;
    const int64_t padded = round_up(call.size, LANES);
    float* hidden_b = pass.workers + worker * pass.scratch_of_worker;
    float* hidden_q = hidden_b + padded;
    float* words = hidden_q + padded;
    const auto pack = [&](float* row, float* streams, int64_t lane) {
        round_to(call.weight.dtype, row, call.size);
        Arithmetic::pack(row, call.size, words);
        float* panel = streams + block * pass.words * PANEL + lane;
        for (int64_t k = 0; k < pass.words; ++k) panel[k * PANEL] = words[k];
    };
    const auto poison_of = [&](const float* row) {
        float poison = 0.0f;
        for (int64_t i = 0; i < call.size; ++i) poison += 0.0f * row[i];
        return poison;
    };
    for (int64_t lane = 0; lane < PANEL; ++lane) {
        const int64_t at = block * PANEL + lane, of_call = pass.first_row + smaller(at, pass.rows - 1);
        load_row(call.hidden_b, of_call, 0, call.size, hidden_b);
        load_row(call.hidden_q, of_call, 0, call.size, hidden_q);
        pass.poison[at] = poison_of(hidden_b);
        pass.poison[pass.padded_rows + at] = poison_of(hidden_q);
        if (pass.two_streams)
            pack(hidden_b, pass.hidden_b, lane);
        else
            for (int64_t i = 0; i < call.size; ++i) hidden_q[i] += call.alpha_0 * hidden_b[i];
        pack(hidden_q, pass.hidden_q, lane);
    }
}

// --- one thread on one part of the vocabulary -------------------------------------------------------------------------

template <class Arithmetic>
struct Sweep {
    static constexpr int64_t WIDTH = Arithmetic::WIDTH;

    const Pass& pass;
    const int64_t part;
    float* free;                                                      // scratch not yet taken
    float* rows_of_tile = take(pass.tile * pass.word_stride);         // W as it lies, for the logits
    float* panels_of_tile = take(pass.tile * pass.padded_size);       // (padded_size / PANEL, words, PANEL), for e
    float* base = take(pass.tile * PANEL);                            // (tile, PANEL) base logits
    float* scores = take(pass.tile * PANEL);                          // q, then the scores
    float* slopes = take(pass.tile * PANEL);                          // derivative of the soft-cap
    float* weights = take(pass.tile * PANEL);                         // words of exp(score - shift)
    float* bias_b = take(pass.tile);
    float* bias_q = take(pass.tile);
    float* decay = take(PANEL);  // of e and of the rows' sums

    Sweep(const Pass& pass, int64_t part, int worker)
        : pass(pass), part(part), free(pass.workers + worker * pass.scratch_of_worker) {}

    float* take(int64_t count) {
        float* taken = free;
        free += count;
        return taken;
    }

    // The rows of the block that starts at `row`.
    int64_t rows_from(int64_t row) const { return smaller(PANEL, pass.rows - row); }

    static int64_t words_of(int64_t count) { return (count + WIDTH - 1) / WIDTH; }

    void run(int64_t first_row, int64_t last_row) {
        const int64_t start = pass.start_of(part), stop = pass.start_of(part + 1);
        for (int64_t first = start; first < stop; first += pass.tile) {
            const int64_t count = smaller(pass.tile, stop - first);
            pack_tile(first, count);
            for (int64_t row = first_row; row < last_row; row += PANEL) {
                multiply(pass.hidden_q, row, count, scores);
                if (pass.two_streams) multiply(pass.hidden_b, row, count, base);
                const bool risen = softmax(row, count, first == start);
                if (pass.expected != nullptr) expect(row, count, first == start, risen);
            }
        }
    }

    void pack_tile(int64_t first, int64_t count) {
        const SoftValueCall& call = pass.call;
        for (int64_t v = 0; v < round_up(count, GEMM_ROWS); ++v) {
            float* row = rows_of_tile + v * pass.word_stride;
            const int64_t filled = v < count ? pass.words : 0;
            if (v < count) Arithmetic::load_words(call.weight, first + v, call.size, row);
            __builtin_memset(row + filled, 0, (pass.word_stride - filled) * sizeof(float));
        }
        for (int64_t v = 0; v < count; ++v) {
            bias_b[v] = call.bias_b == nullptr ? 0.0f : call.bias_b[first + v];
            bias_q[v] = call.bias_q == nullptr ? 0.0f : call.bias_q[first + v];
            if (!pass.two_streams) bias_q[v] += call.alpha_0 * bias_b[v];
        }
        if (pass.expected == nullptr) return;
        float* out = panels_of_tile;
        for (int64_t column = 0; column < pass.padded_size; column += PANEL)
            for (int64_t k = 0; k < words_of(count); ++k)
                for (int n = 0; n < GEMM_VECTORS; ++n, out += LANES)
                    store(out, Arithmetic::across_rows(rows_of_tile, k, pass.word_stride, column + n * LANES));
    }

    // products (tile, PANEL) = W h of the tile and of a block of rows.
    void multiply(const float* hidden, int64_t row, int64_t count, float* products) const {
        for (int64_t v = 0; v < count; v += GEMM_ROWS)
            multiply_panel<Arithmetic>(pass.words, rows_of_tile + v * pass.word_stride, pass.word_stride, 1,
                                       hidden + row * pass.words, products + v * PANEL, PANEL, false, rows_from(row));
    }

    // Products to scores and those to weights, with the running sums of the block. Whether the shift of a score rose.
    bool softmax(int64_t row, int64_t count, bool is_first) {
        bool risen = false;
        for (int64_t column = 0; column < rows_from(row); column += LANES) {
            const RunningSum sum{statistic(Pass::SHIFT, row + column), statistic(Pass::TOTAL, row + column)};
            const Floats level = pass.two_streams ? base_level(row, column, count, is_first) : Floats{};
            const RunningSum::Step step = sum.raise(finish_scores(level, column, count), is_first);
            const Floats terms = pass.expected == nullptr ? exponentials<false>(scores, step.shift, column, count)
                                                          : exponentials<true>(scores, step.shift, column, count);
            sum.add(terms, step.decay, is_first);
            store(decay + column, step.decay);
            risen |= step.risen;
        }
        return risen;
    }

    float* statistic(Pass::Statistic which, int64_t row) const { return pass.of_part(part, which) + row; }

    // Products to base logits b with their running sum, where lse(b) is to be found. Scores are formed of b - level: v is
    // the difference of two lse, and this one stays small however large the logits.
    Floats base_level(int64_t row, int64_t column, int64_t count, bool is_first) const {
        const Floats maxima = finish_base(column, count);
        const RunningSum base_sum{statistic(Pass::BASE_SHIFT, row + column), statistic(Pass::BASE_TOTAL, row + column)};
        if (!pass.with_base_lse) {
            float* known = base_sum.shift;
            for (int lane = 0; is_first && lane < LANES; ++lane)
                known[lane] = pass.call.base_lse[pass.first_row + smaller(row + column + lane, pass.rows - 1)];
            return load(known);
        }
        const Floats before = is_first ? Floats{} : finite(load(base_sum.shift));
        const RunningSum::Step step = base_sum.raise(maxima, is_first);
        base_sum.add(exponentials<false>(base, step.shift, column, count), step.decay, is_first);
        if (step.risen && !is_first) {
            float* shift = statistic(Pass::SHIFT, row + column);
            store(shift, load(shift) - pass.call.alpha_0 * (step.shift - before) / pass.call.alpha_tilde);
        }
        return step.shift;
    }

    // In place: b = s (W h_b + bias), capped. Returns the largest of each row.
    Floats finish_base(int64_t column, int64_t count) const {
        const SoftValueCall& call = pass.call;
        Floats maxima = broadcast(-INFINITE);
        for (int64_t v = 0; v < count; ++v) {
            float* at = base + v * PANEL + column;
            Floats b = call.logit_scale * (load(at) + bias_b[v]);
            if (call.softcap != 0.0f) b = call.softcap * tanh(b / call.softcap);
            store(at, b);
            maxima = maximum(maxima, b);
        }
        return maxima;
    }

    // In place: q = s (W d + bias), capped; scores (q + alpha_0 (b - level)) / alpha_tilde. Returns the largest.
    Floats finish_scores(Floats level, int64_t column, int64_t count) const {
        const SoftValueCall& call = pass.call;
        const float inverse = 1.0f / call.alpha_tilde;
        Floats maxima = broadcast(-INFINITE);
        for (int64_t v = 0; v < count; ++v) {
            const int64_t at = v * PANEL + column;
            Floats q = call.logit_scale * (load(scores + at) + bias_q[v]);
            if (call.softcap != 0.0f) {
                const Floats squashed = tanh(q / call.softcap);
                q = call.softcap * squashed;
                store(slopes + at, 1.0f - squashed * squashed);
            }
            if (call.difference != 0) q -= load(base + at);
            if (pass.two_streams) q += call.alpha_0 * (load(base + at) - level);
            const Floats score = q * inverse;
            store(scores + at, score);
            maxima = maximum(maxima, score);
        }
        return maxima;
    }

    // Sum of exp(x - shift) over the tile; with WEIGHTS stored for e, there times the slope of a soft-cap.
    template <bool WEIGHTS>
    Floats exponentials(const float* x, Floats shift, int64_t column, int64_t count) const {
        Floats total = {};
        for (int64_t k = 0; k < words_of(count); ++k) {
            Floats terms[WIDTH] = {};
            for (int64_t i = 0; i < WIDTH; ++i) {
                const int64_t at = (k * WIDTH + i) * PANEL + column;
                if (k * WIDTH + i == count) break;
                terms[i] = exp(load(x + at) - shift);
                total += terms[i];
                if (WEIGHTS && pass.call.softcap != 0.0f) terms[i] *= load(slopes + at);
            }
            if (WEIGHTS) store(weights + k * PANEL + column, Arithmetic::across_rows(terms));
        }
        return total;
    }

    // e = decay e + weights W for a block of rows.
    void expect(int64_t row, int64_t count, bool is_first, bool risen) const {
        const int64_t words = words_of(count);
        for (int64_t d = 0; d < pass.padded_size; d += PANEL)
            for (int64_t r = 0; r < rows_from(row); r += GEMM_ROWS) {
                float* expected = pass.expected_of(part, row + r, d);
                if (risen && !is_first)
                    for (int64_t i = 0; i < GEMM_ROWS * PANEL; i += LANES)
                        store(expected + i, decay[r + i / PANEL] * load(expected + i));
                multiply_panel<Arithmetic>(words, weights + r, 1, PANEL, panels_of_tile + d * words, expected, PANEL,
                                           !is_first);
            }
    }
};

// --- the parts of one row ---------------------------------------------------------------------------------------------

static void merge(const Pass& pass, int64_t row) {
    const SoftValueCall& call = pass.call;
    const int64_t of_call = pass.first_row + row;
    const auto statistic = [&](int64_t part, Pass::Statistic which) -> float& { return pass.of_part(part, which)[row]; };
    MergedSum base, sum;
    if (pass.with_base_lse)
        for (int64_t part = 0; part < pass.parts; ++part)
            base.add(statistic(part, Pass::BASE_SHIFT), statistic(part, Pass::BASE_TOTAL));
    // The scores of each part were formed of b - its level; now of b - level.
    const float level = finite(base.shift);
    for (int64_t part = 0; part < pass.parts; ++part) {
        float& shift = statistic(part, Pass::SHIFT);
        if (pass.with_base_lse)
            shift -= call.alpha_0 * (level - finite(statistic(part, Pass::BASE_SHIFT))) / call.alpha_tilde;
        sum.add(shift, statistic(part, Pass::TOTAL));
    }
    const float lse = pass.with_base_lse ? base.log() : call.base_lse[of_call];
    // lse(b) - level: a known lse is the level itself, and with one stream there is none.
    const float rest = pass.with_base_lse ? base.log_total() : pass.two_streams ? 0.0f : lse;
    // The tanh of a soft-cap would hide an infinity.
    const float poison_b = call.softcap != 0.0f ? pass.poison[row] : 0.0f;
    const float poison = call.softcap != 0.0f ? poison_b + pass.poison[pass.padded_rows + row] : 0.0f;
    call.lse[of_call] = lse + poison_b;
    call.value[of_call] = call.alpha_tilde * sum.log() - call.alpha_0 * rest + poison;
    if (pass.expected == nullptr) return;

    float* out = call.expected + of_call * call.size;
    const float scale = call.logit_scale / sum.total + poison;
    float factors[PARTS];
    for (int64_t part = 0; part < pass.parts; ++part)
        factors[part] = scale * sum.factor(statistic(part, Pass::SHIFT));
    for (int64_t d = 0; d < call.size; d += LANES) {
        Floats e = {};
        for (int64_t part = 0; part < pass.parts; ++part) e += factors[part] * load(pass.expected_of(part, row, d));
        if (d + LANES <= call.size)
            store(out + d, e);
        else
            store_first(out + d, call.size - d, e);
    }
}

// --- the call ---------------------------------------------------------------------------------------------------------

template <class Arithmetic>
static Pass plan(const SoftValueCall& call) {
    Pass pass{call};
    pass.padded_size = round_up(call.size, PANEL);
    pass.words = (call.size + Arithmetic::WIDTH - 1) / Arithmetic::WIDTH;
    // An odd number of cache lines: rows a power of two apart would share the few places of one set of the cache.
    pass.word_stride = round_up(pass.padded_size / Arithmetic::WIDTH, 32) + 16;
    pass.tile = larger(16, smaller(MAX_TILE, TILE_WORDS / pass.word_stride / 16 * 16));
    pass.parts = smaller(PARTS, (call.vocab + pass.tile - 1) / pass.tile);
    return pass;
}

// Floats that a pass needs for each of its rows.
static int64_t floats_of_row(const Pass& pass) {
    const int64_t expected = pass.call.expected == nullptr ? 0 : pass.parts * pass.padded_size;
    return (pass.two_streams ? 2 : 1) * pass.words + 2 + 4 * pass.parts + expected;
}

template <class Arithmetic>
static bool soft_value(const SoftValueCall& call, int threads) {
    if (call.rows == 0) return true;
    Pass pass = plan<Arithmetic>(call);
    const int64_t most = larger(PANEL, SCRATCH_BYTES / sizeof(float) / floats_of_row(pass) / PANEL * PANEL);
    const int64_t passes = (call.rows + most - 1) / most;
    pass.padded_rows = round_up((call.rows + passes - 1) / passes, PANEL);
    pass.scratch_of_worker = round_up(
        larger(pass.tile * (pass.word_stride + pass.padded_size + 4 * PANEL + 2) + PANEL, 4 * (call.size + PANEL)), 16);

    Scratch scratch(pass.padded_rows * floats_of_row(pass) + threads * pass.scratch_of_worker);
    if (!scratch) return false;
    pass.hidden_q = scratch.take(pass.padded_rows * pass.words);
    pass.hidden_b = pass.two_streams ? scratch.take(pass.padded_rows * pass.words) : nullptr;
    pass.poison = scratch.take(2 * pass.padded_rows);
    pass.statistics = scratch.take(4 * pass.parts * pass.padded_rows);
    pass.expected = call.expected == nullptr ? nullptr : scratch.take(pass.parts * pass.padded_rows * pass.padded_size);
    pass.workers = scratch.take(threads * pass.scratch_of_worker);

    for (; pass.first_row < call.rows; pass.first_row += pass.padded_rows) {
        pass.rows = smaller(pass.padded_rows, call.rows - pass.first_row);
        const int64_t blocks = (pass.rows + PANEL - 1) / PANEL;
        // A tile of W is packed once for each chunk of rows: more than one only where the parts leave threads idle.
        const int64_t chunks = pass.parts % threads == 0 ? 1 : smaller(blocks, 4 * threads / pass.parts + 1);
        parallel(blocks, threads,
                 [&](int64_t block, int worker) { pack_hidden<Arithmetic>(pass, block, worker); });
        parallel(pass.parts * chunks, threads, [&](int64_t item, int worker) {
            const int64_t chunk = item / pass.parts;
            const auto row_of = [&](int64_t chunk) { return smaller(chunk * blocks / chunks * PANEL, pass.rows); };
            Sweep<Arithmetic>(pass, item % pass.parts, worker).run(row_of(chunk), row_of(chunk + 1));
        });
        parallel(blocks, threads, [&](int64_t block, int) {
            for (int64_t row = block * PANEL; row < smaller((block + 1) * PANEL, pass.rows); ++row) merge(pass, row);
        });
    }
    return true;
}
