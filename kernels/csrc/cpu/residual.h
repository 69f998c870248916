// Rows of logits over the whole vocabulary: v and log-probs of the customised policy, and their gradients.

// Columns at a time: the scores of a block stay in the first-level cache between its maximum and its sum.
constexpr int64_t BLOCK = 2048;

// x is filled up to a multiple of LANES.
FQA_INLINE float largest(const float* x, int64_t count) {
    Floats found = broadcast(-INFINITE);
    for (int64_t i = 0; i < count; i += LANES) found = maximum(found, load(x + i));
    return maximum(found);
}

FQA_INLINE void load_block(const Matrix& logits, int64_t row, int64_t first, int64_t count, float* out) {
    load_row(logits, row, first, count, out);
    for (int64_t i = count; i < round_up(count, LANES); ++i) out[i] = -INFINITE;
}

// Calls f(scores, b - level, first column, count) for each block of one row, with scores (q + alpha_0 (b - level)) /
// alpha_tilde, both filled up to a multiple of LANES with -inf. The level, the largest b of the first block, cancels in
// all results, and keeps what is summed small however large the logits.
template <class F>
FQA_INLINE void each_block(const Matrix& q_logits, const Matrix& base_logits, int64_t row, int64_t vocab, float alpha_0,
                           float alpha_tilde, F f) {
    float scores[BLOCK], base[BLOCK], level = 0.0f;
    for (int64_t first = 0; first < vocab; first += BLOCK) {
        const int64_t count = smaller(BLOCK, vocab - first);
        load_block(base_logits, row, first, count, base);
        load_row(q_logits, row, first, count, scores);
        if (first == 0) level = finite(largest(base, count));
        for (int64_t i = 0; i < count; i += LANES) {
            const Floats b = load(base + i) - level;
            store(base + i, b);
            store(scores + i, (load(scores + i) + alpha_0 * b) / alpha_tilde);
        }
        for (int64_t i = count; i < round_up(count, LANES); ++i) scores[i] = -INFINITE;  // alpha_0 may be 0
        f(scores, base, first, count);
    }
}

// log sum exp of what comes in blocks.
struct BlockwiseLse {
    float shift = -INFINITE;
    Floats total = {};

    void add(const float* x, int64_t count) {
        const float found = largest(x, count), raised = found > shift ? found : shift, offset = finite(raised);
        const Floats step = exp(broadcast(raised > shift ? shift - raised : 0.0f));
        Floats terms[2] = {};
        for (int64_t i = 0; i < count; i += LANES) terms[i / LANES % 2] += exp(load(x + i) - offset);
        total = total * step + (terms[0] + terms[1]);
        shift = raised;
    }

    double log_total() const { return __builtin_log(sum(total)); }
    double result() const { return shift + log_total(); }
};

static void residual_soft_value(const ResidualCall& call, int threads) {
    parallel_rows(call.rows, 2 * call.vocab, threads, [&](int64_t row) {
        BlockwiseLse of_scores, of_base;
        each_block(call.q_logits, call.base_logits, row, call.vocab, call.alpha_0, call.alpha_tilde,
                   [&](const float* scores, const float* base, int64_t, int64_t count) {
                       of_scores.add(scores, count);
                       of_base.add(base, count);
                   });
        call.lse[row] = static_cast<float>(of_scores.result());
        call.value[row] = static_cast<float>(call.alpha_tilde * of_scores.result() - call.alpha_0 * of_base.result());
    });
}

static void residual_log_probs(const ResidualCall& call, int threads) {
    parallel_rows(call.rows, 3 * call.vocab, threads, [&](int64_t row) {
        BlockwiseLse of_scores;
        float* out = call.value + row * call.vocab;
        each_block(call.q_logits, call.base_logits, row, call.vocab, call.alpha_0, call.alpha_tilde,
                   [&](const float* scores, const float*, int64_t first, int64_t count) {
                       of_scores.add(scores, count);
                       store_row(out, Dtype::float32, first, count, scores);
                   });
        // Not their sum: scores of 10^4 would swallow the digits of the logarithm.
        const float shift = finite(of_scores.shift), log_total = static_cast<float>(of_scores.log_total());
        for (int64_t i = 0; i < call.vocab; i += LANES) {
            const int64_t count = smaller(LANES, call.vocab - i);
            store_first(out + i, count, (load_first(out + i, count, 0.0f) - shift) - log_total);
        }
    });
}

// dv/dq = softmax(scores).
static void residual_soft_value_bwd(const ResidualBackwardCall& call, int threads) {
    parallel_rows(call.rows, 3 * call.vocab, threads, [&](int64_t row) {
        each_block(call.q_logits, call.base_logits, row, call.vocab, call.alpha_0, call.alpha_tilde,
                   [&](float* scores, const float*, int64_t first, int64_t count) {
                       for (int64_t i = 0; i < count; i += LANES)
                           store(scores + i, call.grad_value[row] * exp(load(scores + i) - call.lse[row]));
                       store_row(call.gradient, call.dtype, row * call.vocab + first, count, scores);
                   });
    });
}

// d log pi~ / dq: (g - pi~ sum g) / alpha_tilde.
static void residual_log_probs_bwd(const ResidualBackwardCall& call, int threads) {
    parallel_rows(call.rows, 3 * call.vocab, threads, [&](int64_t row) {
        float log_probs[BLOCK], grad[BLOCK];
        float sum_of_grad = 0.0f;
        for (int64_t first = 0; first < call.vocab; first += BLOCK) {
            const int64_t count = smaller(BLOCK, call.vocab - first);
            load_row(call.grad, row, first, count, grad);
            Floats terms = {};
            for (int64_t i = 0; i < count; i += LANES) terms += load(grad + i);
            sum_of_grad += sum(terms);
        }
        for (int64_t first = 0; first < call.vocab; first += BLOCK) {
            const int64_t count = smaller(BLOCK, call.vocab - first);
            load_row(call.grad, row, first, count, grad);
            load_row(call.log_probs, row, first, count, log_probs);
            for (int64_t i = 0; i < count; i += LANES)
                store(grad + i, (load(grad + i) - sum_of_grad * exp(load(log_probs + i))) / call.alpha_tilde);
            store_row(call.gradient, call.dtype, row * call.vocab + first, count, grad);
        }
    });
}
