// One thread on one part of the vocabulary: tile by tile, and every block of rows while the tile is in the cache.

template <class Arithmetic>
struct Sweep {
    static constexpr int64_t WIDTH = Arithmetic::WIDTH;

    const Pass& pass;
    const int64_t part;
    float* free;                                                 // scratch not yet taken
    float* rows_of_tile = take(pass.tile * pass.word_stride);    // W as it lies, for the logits
    float* panels_of_tile = take(pass.tile * pass.padded_size);  // (padded_size / PANEL, words, PANEL), for e
    float* base = take(pass.tile * PANEL);                       // (tile, PANEL) base logits
    float* scores = take(pass.tile * PANEL);                     // q, then the scores
    float* slopes = take(pass.tile * PANEL);                     // derivative of the soft-cap
    float* weights = take(pass.tile * PANEL);                    // words of exp(score - shift)
    float* bias_b = take(pass.tile);
    float* bias_q = take(pass.tile);
    float* decay = take(PANEL);  // of e and of the rows' sums

    Sweep(const Pass& pass, int64_t part, int worker)
        : pass(pass), part(part), free(pass.workers + worker * pass.scratch_of_worker) {}

    // All that is taken above.
    static int64_t scratch(const Pass& pass) {
        return pass.tile * (pass.word_stride + pass.padded_size + 4 * PANEL + 2) + PANEL;
    }

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

    // What is subtracted from base logits before they enter a score: lse(b) where it is known, else their running
    // shift. v is the difference of two lse, and the other one stays small this way, however large the logits.
    Floats base_level(int64_t row, int64_t column, int64_t count, bool is_first) const {
        const Floats maxima = finish_base(column, count);
        return pass.with_base_lse ? add_base(maxima, row, column, count, is_first) : known_lse(row + column);
    }

    Floats known_lse(int64_t row) const {
        Floats lse = {};
        for (int lane = 0; lane < LANES; ++lane)
            lse[lane] = pass.call.base_lse[pass.first_row + smaller(row + lane, pass.rows - 1)];
        return lse;
    }

    // The running sum of the base logits. Scores so far were formed with the shift before: theirs moves with it.
    Floats add_base(Floats maxima, int64_t row, int64_t column, int64_t count, bool is_first) const {
        const RunningSum sum{statistic(Pass::BASE_SHIFT, row + column), statistic(Pass::BASE_TOTAL, row + column)};
        const Floats before = is_first ? Floats{} : finite(load(sum.shift));
        const RunningSum::Step step = sum.raise(maxima, is_first);
        sum.add(exponentials<false>(base, step.shift, column, count), step.decay, is_first);
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
            if (call.softcap < INFINITE) b = call.softcap * tanh(b / call.softcap);
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
            if (call.softcap < INFINITE) {
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
                if (WEIGHTS && pass.call.softcap < INFINITE) terms[i] *= load(slopes + at);
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
