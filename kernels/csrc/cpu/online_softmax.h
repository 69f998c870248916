// Sums of exp(x - shift) over tiles and over parts, with a shift that rises only where it must.

// exp(x - shift) may reach e^40 before `shift`, the largest x of a row's first tile, has to rise.
constexpr float HEADROOM = 40.0f;

// A shift to subtract: rows of -inf alone have the terms exp(-inf - 0) = 0, and not exp(-inf - (-inf)) = NaN.
FQA_INLINE Floats finite(Floats shift) { return shift == -INFINITE ? Floats{} : shift; }
FQA_INLINE float finite(float shift) { return shift == -INFINITE ? 0.0f : shift; }

// The running sums of LANES rows, in memory between tiles.
struct RunningSum {
    float* shift;
    float* total;

    // What the terms so far have to be multiplied with after the shift was raised for a tile with these maxima.
    struct Step {
        Floats decay;
        Floats shift;  // for the tile's terms
        bool risen;
    };

    Step raise(Floats maxima, bool is_first) const {
        const Floats before = is_first ? broadcast(-INFINITE) : load(shift);
        const Ints rises = maxima > before + HEADROOM;
        const Floats after = rises ? maxima : before;
        store(shift, after);
        return {rises ? exp(before - after) : broadcast(1.0f), finite(after), any(rises)};
    }

    void add(Floats terms, Floats decay, bool is_first) const {
        store(total, is_first ? terms : load(total) * decay + terms);
    }
};

// The sum of several parts of one row.
struct MergedSum {
    float shift = -INFINITE;
    float total = 0.0f;

    void add(float shift_of_part, float total_of_part) {
        if (shift_of_part > shift) {
            total *= __builtin_expf(shift - shift_of_part);
            shift = shift_of_part;
        }
        total += factor(shift_of_part) * total_of_part;
    }

    // What a part with this shift is multiplied with, once all are added.
    float factor(float shift_of_part) const {
        return shift_of_part == shift && shift < INFINITE ? 1.0f : __builtin_expf(shift_of_part - shift);
    }

    // In float64, for the difference that is taken of two of them.
    double log_total() const { return __builtin_log(total); }
    double log() const { return shift + log_total(); }
};
