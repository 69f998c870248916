// A few numbers for each token of a response: one thread, in float64, is done before two would have started.
#include "preference_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fqa {
namespace {

enum Metric { PREF_LOSS, CHI2_LOSS, CHOSEN, REJECTED, MARGINS, ACCURACIES, Q_VALUES, VALUES };

struct BranchSums {
    double rewards = 0.0, squares = 0.0, q_values = 0.0;
};

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

// The soft value that belongs to a transition: 0 for the terminal state, NaN for a row that does not exist.
double value_of(const PreferenceLossCall& call, int64_t t) {
    const int64_t row = call.value_rows[t];
    if (row < 0) return 0.0;
    return row < call.rows ? static_cast<double>(call.values[row]) : not_a_number;
}

double reward(const PreferenceLossCall& call, int64_t t) {
    // No value, no product: gamma may be infinite only where a value is.
    return call.value_rows[t] < 0 ? call.q_taken[t] : call.q_taken[t] - call.gamma * value_of(call, t);
}

BranchSums branch_sums(const PreferenceLossCall& call, int64_t first, int64_t last) {
    BranchSums sums;
    for (int64_t t = first; t < last; ++t) {
        const double r = reward(call, t);
        sums.rewards += r;
        sums.squares += r * r;
        sums.q_values += call.q_taken[t];
    }
    return sums;
}

// slope + 2 r weight_of_square for a reward, -gamma times that for its value.
void branch_gradients(const PreferenceLossCall& call, int64_t first, int64_t last, double slope,
                      double weight_of_square) {
    for (int64_t t = first; t < last; ++t) {
        const double gradient = slope + 2.0 * weight_of_square * reward(call, t);
        call.grad_q[t] = static_cast<float>(gradient);
        const int64_t row = call.value_rows[t];
        if (row >= 0 && row < call.rows) call.grad_values[row] += static_cast<float>(-call.gamma * gradient);
    }
}

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

double pair_loss(const PreferenceLossCall& call, int64_t pair) {
    const int64_t first = call.branch_ends[2 * pair], middle = call.branch_ends[2 * pair + 1],
                  last = call.branch_ends[2 * pair + 2];
    // Ends that fall, or lie outside: the caller checks them, but cannot under torch.compile.
    if (!(0 <= first && first <= middle && middle <= last && last <= call.transitions)) {
        for (int metric = PREF_LOSS; metric <= VALUES; ++metric)
            call.metrics[metric * call.pairs + pair] = static_cast<float>(not_a_number);
        return not_a_number;
    }
    const BranchSums chosen = branch_sums(call, first, middle), rejected = branch_sums(call, middle, last);
    const double divisor = call.divisor[pair], squares_divisor = call.squares_divisor[pair];
    const double pairs = static_cast<double>(call.pairs);
    const double margin = (chosen.rewards - rejected.rewards) / divisor;
    // An infinite reward must not hide: -log sigmoid(inf) is 0, a wrong finite number, and 0 * inf is NaN.
    const double preference = softplus(-margin) + 0.0 * (chosen.rewards + rejected.rewards);
    const double squares = (chosen.squares + rejected.squares) / squares_divisor;

    const double slope = -1.0 / ((1.0 + std::exp(margin)) * divisor * pairs);
    const double weight_of_square = call.beta / (squares_divisor * pairs);
    branch_gradients(call, first, middle, slope, weight_of_square);
    branch_gradients(call, middle, last, -slope, weight_of_square);

    const double count = static_cast<double>(std::max<int64_t>(last - first, 1));
    const double q_values = chosen.q_values + rejected.q_values;
    const auto put = [&](Metric metric, double x) { call.metrics[metric * call.pairs + pair] = static_cast<float>(x); };
    put(PREF_LOSS, preference);
    put(CHI2_LOSS, squares);
    put(CHOSEN, chosen.rewards / divisor);
    put(REJECTED, rejected.rewards / divisor);
    put(MARGINS, margin);
    put(ACCURACIES, margin > 0.0 ? 1.0 : margin == 0.0 ? 0.5 : 0.0);
    put(Q_VALUES, q_values / count);
    put(VALUES, (q_values - chosen.rewards - rejected.rewards) / count);
    return preference + call.beta * squares;
}

}  // namespace

void preference_loss(const PreferenceLossCall& call) {
    std::fill(call.grad_q, call.grad_q + call.transitions, 0.0f);
    std::fill(call.grad_values, call.grad_values + call.rows, 0.0f);
    double sum = 0.0;
    for (int64_t pair = 0; pair < call.pairs; ++pair) sum += pair_loss(call, pair);
    *call.loss = static_cast<float>(sum / static_cast<double>(call.pairs));
}

}  // namespace fqa
