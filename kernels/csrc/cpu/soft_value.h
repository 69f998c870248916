// v, lse(b) and e = dv/dhidden_q from hidden states, without logits over the whole vocabulary; see
// fastqadapter/ops/soft_value.py for the mathematics.
//
// Rows lie across the lanes of vectors: a tile of logits is (vocabulary, PANEL rows), and its maxima and sums are those
// of vectors, without a sum over lanes. The vocabulary is cut into parts, which threads take one by one. Each part has
// its own running softmax and its own e; they are added up in the end, in their order: results do not depend on
// threads.

// --- the parts of one row --------------------------------------------------------------------------------------------

static void merge(const Pass& pass, int64_t row) {
    const SoftValueCall& call = pass.call;
    const int64_t of_call = pass.first_row + row;
    const auto statistic = [&](int64_t part, Pass::Statistic which) -> float& {
        return pass.of_part(part, which)[row];
    };
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
    const double lse = pass.with_base_lse ? base.log() : call.base_lse[of_call];
    // lse(b) - level: a known lse is the level itself, and with one stream there is none.
    const double rest = pass.with_base_lse ? base.log_total() : pass.two_streams ? 0.0 : lse;
    // The tanh of a soft-cap would hide an infinity.
    const float poison_b = call.softcap < INFINITE ? pass.poison[row] : 0.0f;
    const float poison = call.softcap < INFINITE ? poison_b + pass.poison[pass.padded_rows + row] : 0.0f;
    call.lse[of_call] = static_cast<float>(lse) + poison_b;
    call.value[of_call] = static_cast<float>(call.alpha_tilde * sum.log() - call.alpha_0 * rest) + poison;
    if (pass.expected == nullptr) return;

    float* out = call.expected + of_call * call.size;
    const float scale = call.logit_scale / sum.total + poison;
    float factors[PARTS];
    for (int64_t part = 0; part < pass.parts; ++part) factors[part] = scale * sum.factor(statistic(part, Pass::SHIFT));
    for (int64_t d = 0; d < call.size; d += LANES) {
        Floats e = {};
        for (int64_t part = 0; part < pass.parts; ++part) e += factors[part] * load(pass.expected_of(part, row, d));
        store_first(out + d, smaller(LANES, call.size - d), e);
    }
}

// --- the call --------------------------------------------------------------------------------------------------------

// The rows of one pass: packed, walked over, and their parts added up.
template <class Arithmetic>
static void run_pass(const Pass& pass, int threads) {
    const int64_t blocks = (pass.rows + PANEL - 1) / PANEL;
    parallel(blocks, threads, [&](int64_t block, int worker) { pack_hidden<Arithmetic>(pass, block, worker); });
    // Every chunk of rows packs the tiles of W anew: more than one only where the parts leave threads idle, and then
    // enough for four items a thread.
    const int64_t chunks = pass.parts % threads == 0 ? 1 : smaller(blocks, 4 * threads / pass.parts + 1);
    const auto first_row_of = [&](int64_t chunk) { return smaller(chunk * blocks / chunks * PANEL, pass.rows); };
    parallel(pass.parts * chunks, threads, [&](int64_t item, int worker) {
        const int64_t chunk = item / pass.parts;
        Sweep<Arithmetic>(pass, item % pass.parts, worker).run(first_row_of(chunk), first_row_of(chunk + 1));
    });
    parallel(blocks, threads, [&](int64_t block, int) {
        for (int64_t row = block * PANEL; row < smaller((block + 1) * PANEL, pass.rows); ++row) merge(pass, row);
    });
}

template <class Arithmetic>
static bool soft_value(const SoftValueCall& call, int threads) {
    if (call.rows == 0) return true;
    Pass pass{call, Arithmetic::WIDTH};
    pass.padded_rows = pass.rows_of_pass();
    pass.scratch_of_worker = round_up(larger(Sweep<Arithmetic>::scratch(pass), scratch_of_packing(pass)), LANES);

    Scratch scratch(pass.padded_rows * pass.floats_of_row() + threads * pass.scratch_of_worker);
    if (!scratch) return false;
    pass.hidden_q = scratch.take(pass.padded_rows * pass.words);
    if (pass.two_streams) pass.hidden_b = scratch.take(pass.padded_rows * pass.words);
    pass.poison = scratch.take(2 * pass.padded_rows);
    pass.statistics = scratch.take(4 * pass.parts * pass.padded_rows);
    if (call.expected != nullptr) pass.expected = scratch.take(pass.parts * pass.padded_rows * pass.padded_size);
    pass.workers = scratch.take(threads * pass.scratch_of_worker);

    for (; pass.first_row < call.rows; pass.first_row += pass.padded_rows) {
        pass.rows = smaller(pass.padded_rows, call.rows - pass.first_row);
        run_pass<Arithmetic>(pass, threads);
    }
    return true;
}
