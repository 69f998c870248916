// Scratch memory of one call, and the loops over its threads.

class Scratch {
   public:
    explicit Scratch(int64_t floats) : block_(malloc(floats * sizeof(float) + CACHE_LINE)) {
        const auto address = reinterpret_cast<uintptr_t>(block_);
        free_ = reinterpret_cast<float*>((address + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
    }
    ~Scratch() { free(block_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    explicit operator bool() const { return block_ != nullptr; }

    float* take(int64_t floats) {
        float* taken = free_;
        free_ += floats;
        return taken;
    }

   private:
    static constexpr uintptr_t CACHE_LINE = 64;
    void* block_;
    float* free_;
};

// f(item, worker) for each item, see parallel_for.
template <class F>
static void parallel(int64_t items, int threads, F f) {
    parallel_for(
        items, threads, [](void* context, int64_t item, int worker) { (*static_cast<F*>(context))(item, worker); }, &f);
}

// f(item) for all items, in as many runs as keep `threads` threads busy with `cost` elements or more each.
template <class F>
static void parallel_rows(int64_t items, int64_t cost, int threads, F f) {
    constexpr int64_t LEAST_COST = 32768;  // about 10 us, what starting the threads takes
    const int64_t at_once = larger(1, larger((items + 4 * threads - 1) / (4 * threads), LEAST_COST / larger(1, cost)));
    parallel((items + at_once - 1) / at_once, threads, [&](int64_t run, int) {
        for (int64_t item = run * at_once; item < smaller((run + 1) * at_once, items); ++item) f(item);
    });
}
