// W[a] . d of each transition, and the gradient of the hidden states, dd[s] = g_v[s] e[s] + sum g_x[t] W[a_t].

// Columns at a time, in buffers on the stack.
constexpr int64_t COLUMNS = 1024;

static void taken_value(const TakenValueCall& call, int threads) {
    parallel_rows(call.transitions, 2 * call.size, threads, [&](int64_t t) {
        const int64_t state = call.states == nullptr ? t : call.states[t], action = call.actions[t];
        // The caller checks both where it can see them; under torch.compile it cannot.
        if (action < 0 || action >= call.vocab || state < 0 || state >= call.rows) {
            call.value[t] = NOT_A_NUMBER;
            return;
        }
        float w[COLUMNS], d[COLUMNS];
        Floats products = {};
        for (int64_t first = 0; first < call.size; first += COLUMNS) {
            const int64_t count = smaller(COLUMNS, call.size - first);
            load_row(call.weight, action, first, count, w);
            load_row(call.hidden, state, first, count, d);
            for (int64_t i = 0; i < count; i += LANES) products += load(w + i) * load(d + i);
        }
        call.value[t] = sum(products);
    });
}

static void hidden_gradient(const HiddenGradientCall& call, int threads) {
    parallel_rows(call.rows, 3 * call.size, threads, [&](int64_t s) {
        float w[COLUMNS], gradient[COLUMNS];
        const Matrix expected = {call.expected, call.size, 1, Dtype::float32};
        for (int64_t first = 0; first < call.size; first += COLUMNS) {
            const int64_t count = smaller(COLUMNS, call.size - first);
            if (call.expected != nullptr) load_row(expected, s, first, count, gradient);
            for (int64_t i = 0; i < count; i += LANES)
                store(gradient + i, call.expected == nullptr ? Floats{} : call.grad_value[s] * load(gradient + i));
            for (int64_t at = larger(0, call.ends[s]); at < smaller(call.ends[s + 1], call.transitions); ++at) {
                const int64_t t = call.order[at];
                if (t < 0 || t >= call.transitions) continue;
                const int64_t action = call.actions[t];
                // The value of an action outside is NaN, a constant: its gradient is 0.
                if (action < 0 || action >= call.vocab) continue;
                load_row(call.weight, action, first, count, w);
                for (int64_t i = 0; i < count; i += LANES)
                    store(gradient + i, load(gradient + i) + call.grad_taken[t] * load(w + i));
            }
            store_row(call.gradient, call.dtype, s * call.size + first, count, gradient);
        }
    });
}
