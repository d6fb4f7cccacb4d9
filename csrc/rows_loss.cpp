// The losses of one row of logits and their gradient, from the row's exponentials and the few columns that sources or the label name.
// kernels/chunk_losses.py computes the same for a chunk of rows in torch, and explains each step; the names are the same here.
//
// The few numbers are fp64, in which nothing has to be arranged for their digits' sake but what may underflow.

#include "rows.h"

#include <cmath>
#include <limits>

namespace profuser {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLowest = -1e30;  // maxima start here, as in kernels/common.py
constexpr double kNoTail = 1e-5;   // a tail that is nothing but rounding, as in kernels/common.py
constexpr double kTiny = 1e-38;    // the least sum of exponentials that is divided by

struct Part {
    double value, slope;
};

double log_add_exp(double a, double b) {
    const double higher = a > b ? a : b, lower = a > b ? b : a;
    return higher == -kInfinity ? higher : higher + std::log1p(std::exp(lower - higher));
}

// One part of the divergence and q·(∂D/∂q + c), as kernels/divergences_torch.py has them.
Part divergence_part(Divergence divergence, double beta, double p, double log_p, double q, double log_q) {
    switch (divergence) {
        case Divergence::forward_kl:
            return {p == 0 ? 0 : p * (log_p - log_q), -p};
        case Divergence::reverse_kl: {
            const double value = q == 0 ? 0 : q * (log_q - log_p);
            return {value, value};
        }
        case Divergence::tvd: {
            const double sign = q > p ? 1 : q < p ? -1 : q - p;
            return {std::abs(p - q) / 2, q * sign / 2};
        }
        default:
            break;
    }
    const double share_of_p = divergence == Divergence::skew_reverse_kl ? 1 - beta : beta;
    const double log_m = log_add_exp(log_p + std::log(share_of_p), log_q + std::log(1 - share_of_p));
    const double q_over_m = log_m == -kInfinity ? 0 : std::exp(log_q - log_m);
    const double q_against_m = q == 0 ? 0 : q * (log_q - log_m);
    const double p_against_m = p == 0 ? 0 : p * (log_p - log_m);
    if (divergence == Divergence::jsd) {
        return {beta * p_against_m + (1 - beta) * q_against_m, (1 - beta) * q_against_m};
    }
    if (divergence == Divergence::skew_kl) {
        return {p_against_m, (1 - beta) * (1 - beta) * q_over_m * (q - p)};
    }
    return {q_against_m, q_against_m + beta * (1 - beta) * q_over_m * (p - q)};
}

// What was read in place of the lifted columns, one slot for each id and the last one for the label.
struct Lifted {
    std::size_t L;
    std::int64_t gold;
    const RowEntries& entries;
    double *z, *e, *grad;  // (L + 1): logits, exponentials relative to the row's maximum, and the gradient

    std::int64_t column(std::size_t j) const { return j < L && entries.ids[j] >= 0 ? entries.ids[j] : gold; }
    bool has_entry(std::size_t j) const { return j < L && entries.ids[j] >= 0; }
    bool is_apart(std::size_t j) const { return j < L && entries.apart[j]; }
};

struct Distilled {
    double kd, target_mass;
    double grad_dense;  // times an exponential at T relative to m_dense, the gradient of a column that was not lifted
};

// Compares the target with each source, on that source's ids and one bucket, and writes the gradient in u = z/T at the lifted columns
// into `grad`. `numbers` has room for 6·(L + 1).
Distilled distil(const Lifted& lifted, double m, double m_dense, double sum_dense_T, double T, const LossOptions& options, double* grad,
                 double* numbers) {
    const RowEntries& entries = lifted.entries;
    const std::size_t L = lifted.L, slots = L + 1;
    double *below = numbers, *q_lifted = below + slots, *q = q_lifted + slots, *log_q = q + slots, *slope = log_q + slots,
           *in_rest = slope + slots;

    bool gold_kept = false;
    for (std::size_t j = 0; j < L; ++j) {
        gold_kept |= lifted.has_entry(j) && !entries.apart[j];
    }
    const auto once = [&](std::size_t j) { return j < L ? lifted.has_entry(j) : !gold_kept; };

    // The target at T.
    const double shrink_T = std::exp((m_dense - m) / T);
    double total_T = sum_dense_T * shrink_T;
    for (std::size_t j = 0; j < slots; ++j) {
        below[j] = (lifted.z[j] - m) / T;
        q_lifted[j] = T == 1 ? lifted.e[j] : std::exp(below[j]);
        total_T += once(j) ? q_lifted[j] : 0;
        grad[j] = 0;
    }
    const double log_total_T = std::log(total_T);
    for (std::size_t j = 0; j < slots; ++j) {
        q_lifted[j] /= total_T;
    }

    Distilled distilled{0, 0, 0};
    double weights = 0;
    for (std::size_t w = 0; w < entries.W; ++w) {
        const bool* named = entries.inside + w * L;
        const float *p = entries.p + w * slots, *log_p = entries.log_p + w * slots;
        const auto inside = [&](std::size_t j) { return j < L && named[j]; };

        double mass_kept = 0, highest = kLowest, dense_in_rest = 0, log_q_rest = -kInfinity;
        bool is_nowhere = false;  // the tail, where no column outside the entries can have a probability
        for (std::size_t j = 0; j < slots; ++j) {
            mass_kept += inside(j) ? q_lifted[j] : 0;
        }
        if (options.conditional) {
            for (std::size_t j = 0; j < L; ++j) {
                highest = inside(j) ? std::max(highest, lifted.z[j] / T) : highest;
            }
            double sum = 0;
            for (std::size_t j = 0; j < L; ++j) {
                sum += inside(j) ? std::exp(lifted.z[j] / T - highest) : 0;
            }
            const double log_sum = std::log(sum < kTiny ? kTiny : sum);
            for (std::size_t j = 0; j < L; ++j) {
                log_q[j] = inside(j) ? lifted.z[j] / T - highest - log_sum : -kInfinity;
                q[j] = std::exp(log_q[j]);
            }
        } else {
            double m_rest = m_dense;
            for (std::size_t j = 0; j < slots; ++j) {
                m_rest = once(j) && !inside(j) ? std::max(m_rest, lifted.z[j]) : m_rest;
            }
            is_nowhere = m_rest <= kLowest && p[L] <= kNoTail;
            dense_in_rest = std::exp((m_dense - m_rest) / T);
            double rest = sum_dense_T * dense_in_rest;
            for (std::size_t j = 0; j < slots; ++j) {
                in_rest[j] = once(j) && !inside(j) ? std::exp((lifted.z[j] - m_rest) / T) : 0;
                rest += in_rest[j];
            }
            rest = rest < kTiny ? kTiny : rest;
            for (std::size_t j = 0; j < slots; ++j) {
                in_rest[j] /= rest;
            }
            dense_in_rest /= rest;
            log_q_rest = (m_rest - m) / T + std::log(rest) - log_total_T;
            for (std::size_t j = 0; j < L; ++j) {
                log_q[j] = inside(j) ? below[j] - log_total_T : -kInfinity;
                q[j] = inside(j) ? q_lifted[j] : 0;
            }
        }
        log_q[L] = log_q_rest;
        q[L] = std::exp(log_q_rest);

        // D and its gradient: slope_j − q_j·Σ slope at a part, of which the columns of the rest take their shares.
        double value = 0, slope_sum = 0;
        for (std::size_t j = 0; j < slots; ++j) {
            const Part part = divergence_part(options.divergence, options.beta, p[j], log_p[j], q[j], log_q[j]);
            value += j == L && is_nowhere ? 0 : part.value;
            slope[j] = part.slope;
            slope_sum += part.slope;
        }
        const double weight = entries.weight[w];
        for (std::size_t j = 0; j < slots; ++j) {
            if (options.conditional) {
                grad[j] += inside(j) ? weight * (slope[j] - q[j] * slope_sum) : 0;
            } else {
                grad[j] += weight * ((inside(j) ? slope[j] : slope[L] * in_rest[j]) - q_lifted[j] * slope_sum);
            }
        }
        if (!options.conditional) {
            distilled.grad_dense += weight * (slope[L] * dense_in_rest - slope_sum * (shrink_T / total_T));
        }
        distilled.kd += weight * value;
        distilled.target_mass += weight * mass_kept;
        weights += weight;
    }
    distilled.kd *= T * T;
    distilled.target_mass /= weights != 0 ? weights : 1;
    if (gold_kept) {
        grad[L] = 0;
        for (std::size_t j = 0; j < L; ++j) {
            grad[L] += lifted.has_entry(j) && !entries.apart[j] ? grad[j] : 0;
        }
    }
    return distilled;
}

}  // namespace

RowLosses loss_row(float* logits, std::size_t columns, std::int64_t gold, const RowEntries& entries, double weight_ce, double weight_kd,
                   double temperature, const LossOptions& options, RowGradient* parts, RowBuffers& buffers) {
    const std::size_t L = entries.L, slots = L + 1;
    const bool distils = entries.W > 0, at_one = parts != nullptr ? parts->at_T == nullptr : !distils || temperature == 1;
    double* numbers = buffers.numbers.data();
    const Lifted lifted{L, gold, entries, numbers, numbers + slots, numbers + 2 * slots};
    double *z = lifted.z, *e = lifted.e, *grad = lifted.grad, *grad_kd = numbers + 3 * slots;
    const double sum_z = options.label_smoothing != 0 ? sum_row(logits, columns) : 0;

    // Lift: read the logits at the kept ids and at the gold id, and write −inf in their place.
    for (std::size_t j = 0; j < slots; ++j) {
        z[j] = logits[lifted.column(j)];
    }
    for (std::size_t j = 0; j < slots; ++j) {
        logits[lifted.column(j)] = -std::numeric_limits<float>::infinity();
    }

    // The dense part: from here on the logits are exponentials.
    float* at_T = parts != nullptr ? parts->at_T : nullptr;
    if (!at_one && at_T == nullptr) {
        at_T = buffers.at_T.data();
    }
    const RowSums sums = exp_row(logits, columns, options.entropies, at_T, static_cast<float>(1 / temperature));
    const double m_dense = sums.maximum, sum_dense = sums.sum;

    // The whole row at T = 1: the dense part and the lifted entries, each id once.
    double m = m_dense;
    for (std::size_t j = 0; j < slots; ++j) {
        m = z[j] > m ? z[j] : m;
    }
    const double shrink = std::exp(m_dense - m);
    double others = sum_dense * shrink;
    double spread = (sums.spread + sum_dense * (m - m_dense)) * shrink;
    for (std::size_t j = 0; j < slots; ++j) {
        e[j] = std::exp(z[j] - m);
        others += lifted.is_apart(j) ? e[j] : 0;
        spread += (j == L || lifted.is_apart(j)) && e[j] != 0 ? e[j] * (m - z[j]) : 0;
    }
    const double e_gold = e[L], total = others + e_gold, lse = m + std::log(total);
    RowLosses losses{};
    losses.ce = others < e_gold ? std::log1p(others / e_gold) : std::log(total) - (z[L] - m);
    losses.entropy = options.entropies ? std::log(total) + spread / total : 0;
    losses.learnt = losses.ce;
    double scalar = weight_ce;
    if (options.label_smoothing != 0) {
        const double columns_mean = sum_z / static_cast<double>(columns);
        losses.learnt = (1 - options.label_smoothing) * losses.ce + options.label_smoothing * (lse - columns_mean);
    }
    if (options.z_loss != 0) {
        losses.learnt += options.z_loss * lse * lse;
        scalar *= 1 + 2 * options.z_loss * lse;
    }
    Distilled distilled{0, 0, 0};
    if (distils) {
        distilled = distil(lifted, m, m_dense, sums.sum_T, temperature, options, grad_kd, numbers + 4 * slots);
        losses.kd = distilled.kd;
        losses.target_mass = distilled.target_mass;
    }
    if (!options.gradient) {
        return losses;
    }

    // Cross-entropy: scalar·q on all columns, of which the weight is taken from the gold one without a difference. Label smoothing takes
    // its share of that from all columns alike.
    const double even = weight_ce * options.label_smoothing / static_cast<double>(columns), weight_kd_T = weight_kd * temperature;
    for (std::size_t j = 0; j < slots; ++j) {
        const double of_ce = j < L ? scalar * (e[j] / total) : (scalar - weight_ce) * (e_gold / total) - weight_ce * (others / total);
        grad[j] = of_ce - even + (distils ? weight_kd_T * grad_kd[j] : 0);
    }
    grad[L] += weight_ce * options.label_smoothing;
    double dense = scalar * shrink / total, dense_T = weight_kd_T * distilled.grad_dense;
    if (at_one) {
        dense += dense_T;
        dense_T = 0;
    }
    // All slots that point at the gold id have the same value.
    const auto value = [&](std::size_t j) { return static_cast<float>(lifted.is_apart(j) ? grad[j] : grad[L]); };
    const float factor = static_cast<float>(dense), factor_T = static_cast<float>(dense_T);
    if (parts != nullptr) {
        parts->dense = factor;
        parts->dense_T = factor_T;
        parts->even = static_cast<float>(even);
        for (std::size_t j = 0; j < slots; ++j) {
            parts->columns[j] = lifted.column(j);
            parts->lifted[j] = value(j);
        }
        if (parts->mass != nullptr) {
            add_mass(parts->mass, logits, columns, factor);
        }
        if (parts->mass_T != nullptr) {
            add_mass(parts->mass_T, at_T, columns, factor_T);
        }
        return losses;
    }
    scale_row(logits, columns, factor, at_T, factor_T, static_cast<float>(-even));
    for (std::size_t j = 0; j < slots; ++j) {
        logits[lifted.column(j)] = value(j);
    }
    return losses;
}

}  // namespace profuser
