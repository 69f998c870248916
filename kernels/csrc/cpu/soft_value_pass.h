// One pass of soft_value over the vocabulary: what its threads share, and the rows of hidden states in it.

constexpr int64_t PARTS = 8;
// Of a tile of W: its two copies stay in a cache of 1 MB while all rows pass by. A third of that took 4% longer at
// D = 4096 in bf16, where e was read and written so much more often.
constexpr int64_t TILE_WORDS = 96 * 1024;
constexpr int64_t MAX_TILE = 128;
// Scratch memory of one pass, beside a tile for each thread; more rows take more passes. With 44 MiB a pass of 512 rows
// of D = 2048 in fp32 is one.
constexpr int64_t SCRATCH_BYTES = 44 << 20;

// What all threads share in one pass. Its sizes are those of the call; its memory and its rows come with `soft_value`.
struct Pass {
    const SoftValueCall& call;
    const int64_t width;                                     // elements in a word
    const int64_t words = (call.size + width - 1) / width;   // of a row of hidden states or of W
    const int64_t padded_size = round_up(call.size, PANEL);  // of a row of e
    const bool with_base_lse = call.base_lse == nullptr;     // lse(b) is to be found
    // Base logits by a product of their own, else q + alpha_0 b by one product (identity 1).
    const bool two_streams = with_base_lse || call.softcap < INFINITE;
    // Of a row of W in a tile. An odd number of cache lines: rows that lie a power of two apart would share the few
    // places of one set of the cache.
    const int64_t word_stride = round_up(padded_size / width, 32) + 16;
    const int64_t tile = larger(16, smaller(MAX_TILE, TILE_WORDS / word_stride / 16 * 16));  // rows of W
    const int64_t parts = smaller(PARTS, (call.vocab + tile - 1) / tile);                    // of the vocabulary

    int64_t first_row = 0, rows = 0;  // of the call
    int64_t padded_rows = 0;          // up to a multiple of PANEL
    float* hidden_b = nullptr;        // (padded_rows / PANEL, words, PANEL)
    float* hidden_q = nullptr;        // the same; with one stream d + alpha_0 h_b
    float* poison =
        nullptr;  // (2, padded_rows) of h_b and of d: NaN for a row with NaN or infinity under a soft-cap, else 0
    float* statistics = nullptr;  // (parts, 4, padded_rows), see `Statistic`
    float* expected = nullptr;    // where e is wanted, see `expected_of`
    float* workers = nullptr;     // (threads, scratch_of_worker)
    int64_t scratch_of_worker = 0;

    enum Statistic { SHIFT, TOTAL, BASE_SHIFT, BASE_TOTAL };

    float* of_part(int64_t part, Statistic which) const { return statistics + (4 * part + which) * padded_rows; }

    // e in panels, so that the product of a tile writes one piece of memory: (parts, padded_rows / PANEL,
    // padded_size / PANEL, PANEL rows, PANEL columns). In rows as wide as D, D = 2048 took 17% longer.
    float* expected_of(int64_t part, int64_t row, int64_t column) const {
        const int64_t block = row / PANEL * PANEL, panel = column / PANEL * PANEL;
        return expected + (part * padded_rows + block) * padded_size + panel * PANEL + row % PANEL * PANEL +
               column % PANEL;
    }

    // The first token of a part.
    int64_t start_of(int64_t part) const {
        const int64_t tiles = (call.vocab + tile - 1) / tile;
        return smaller(part * tiles / parts * tile, call.vocab);
    }

    // Floats of scratch for each row.
    int64_t floats_of_row() const {
        const int64_t of_expected = call.expected == nullptr ? 0 : parts * padded_size;
        return (two_streams ? 2 : 1) * words + 2 + 4 * parts + of_expected;
    }

    // As many rows as the scratch holds, and as many in the last pass as in the first.
    int64_t rows_of_pass() const {
        const int64_t most = larger(PANEL, SCRATCH_BYTES / sizeof(float) / floats_of_row() / PANEL * PANEL);
        const int64_t passes = (call.rows + most - 1) / most;
        return round_up((call.rows + passes - 1) / passes, PANEL);
    }
};

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

// Floats that pack_hidden needs: two rows of floats and one of words.
static int64_t scratch_of_packing(const Pass& pass) { return 3 * round_up(pass.call.size, LANES); }

template <class Arithmetic>
static void pack_hidden(const Pass& pass, int64_t block, int worker) {
    const SoftValueCall& call = pass.call;
    const int64_t padded = round_up(call.size, LANES);
    float* hidden_b = pass.workers + worker * pass.scratch_of_worker;
    float* hidden_q = hidden_b + padded;
    float* words = hidden_q + padded;
    const auto pack = [&](float* row, float* streams, int64_t lane) {
        // A sum of both streams stays as it is where words are floats: in fp16 it may be too large a number.
        if (pass.two_streams) round_to(call.weight.dtype, row, call.size);
        Arithmetic::pack(row, call.size, words);
        float* panel = streams + block * pass.words * PANEL + lane;
        for (int64_t k = 0; k < pass.words; ++k) panel[k * PANEL] = words[k];
    };
    const auto poison_of = [&](const float* row) {
        float poison = 0.0f;
        for (int64_t i = 0; call.softcap < INFINITE && i < call.size; ++i) poison += 0.0f * row[i];
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
