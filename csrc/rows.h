// What a CPU does to rows of logits between the matrix products of the fused loss: the parts of the Python module profuser._rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "threads.h"

namespace profuser {

struct RowSums {
    float maximum;  // of the row, -1e30 at least
    float sum;      // of the exponentials relative to it
    float sum_T;    // the same at a temperature; `sum` where none was asked for
    float spread;   // the sum of each exponential times how far its number was below the maximum; 0 unless it was asked for
};

// One row: its maximum, and the exponentials relative to it in place. Unless `at_T` is null, it receives the exponentials of the same
// differences times `inverse_T`.
RowSums exp_row(float* row, std::size_t columns, bool with_spread, float* at_T, float inverse_T);

// row · factor + at_T · factor_T + shift in place, without the second product where `at_T` is null.
void scale_row(float* row, std::size_t columns, float factor, const float* at_T, float factor_T, float shift);

// mass += |factor| · row
void add_mass(float* mass, const float* row, std::size_t columns, float factor);

// The sum of a row.
double sum_row(const float* row, std::size_t columns);

enum class Divergence { forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd };

// What is the same for all rows, named as the options of kernels/fused_loss_types.py.
struct LossOptions {
    Divergence divergence;
    double beta;
    bool conditional;  // the tail
    double label_smoothing;
    double z_loss;
    bool entropies;
    bool gradient;  // whether the logits become their gradient
};

// What one row's sources say, as in kernels/kept.py: W sources, L ids that any of them names.
struct RowEntries {
    std::size_t W, L;
    const std::int64_t* ids;  // (L), -1 = no entry
    const bool* inside;       // (W, L)
    const float* p;           // (W, L + 1)
    const float* log_p;       // (W, L + 1)
    const float* weight;      // (W)
    const bool* apart;        // (L)
};

// What the sources of one row say as it was given: W sources with K entries each.
struct GivenEntries {
    std::size_t W, K;
    const std::int64_t* ids;  // (W, K), -1 = no entry
    const double* log_p;      // (W, K)
    const double* tail;       // (W) mass outside the entries; null where it is what they lack of 1
};

// What becomes of the mass outside a source's entries, as kernels/kept.py settles it.
struct TailRule {
    bool bucket;             // else it is divided out
    double absent_tail;      // of a source without an entry
    double tail_floor;       // the least mass of the bucket, and of all entries together; 0 where none is needed, likewise the next
    double entry_floor;      // an entry of less belongs to the bucket
    std::size_t vocabulary;  // the number of all ids
};

// Where RowEntries are written, and beside them what was given.
struct KeptEntries {
    std::int64_t* ids;
    bool* inside;
    float *p, *log_p;
    bool* apart;
    double* mass;   // (W) of the entries, as it was given
    bool* present;  // (W) whether the entries have a mass at all
};

struct Entry {
    std::int64_t id;
    double p;
};

// Numbers that a row's entries need for a while, allocated ahead as RowBuffers are.
struct EntryBuffers {
    std::vector<Entry> entries;  // W·K
    std::vector<double> p;       // W·(W·K + 1)
    std::vector<double> tails;   // W
};

// Makes the entries of one row ready to be compared with the target's logits; L of RowEntries is W·K.
void keep_entries(const GivenEntries& given, std::int64_t label, const TailRule& rule, const KeptEntries& kept, EntryBuffers& buffers);

// What one row's logits say, as ChunkLosses of kernels/chunk_losses.py.
struct RowLosses {
    double ce, learnt, kd, target_mass, entropy;
};

// What one row's gradient is made of, as ChunkGradient of kernels/chunk_gradient.py, in place of the gradient itself.
struct RowGradient {
    float dense, dense_T, even;
    float* lifted;          // (L + 1)
    std::int64_t* columns;  // (L + 1)
    float* at_T;            // the row's exponentials at its temperature; null where those at 1 are all that is needed
    float* mass;            // of each column, where this row's |dense| times its exponentials is added; null where nobody asks
    float* mass_T;          // the same of those at the temperature
};

// Numbers that a row needs for a while; a thread uses them again for its next row. All are allocated ahead of it, because a thread must
// not throw.
struct RowBuffers {
    std::vector<float> at_T;      // as many as columns where a row's temperature is not 1 and RowGradient is not asked for
    std::vector<double> numbers;  // 10·(L + 1)
};

// The losses of one row of logits, which become their gradient where the options ask for it; with `parts` they stay exponentials, and
// what the gradient is made of is written there. `weight_ce` and `weight_kd` are the row's weights in the gradient. W = L = 0 without
// sources.
RowLosses loss_row(float* logits, std::size_t columns, std::int64_t gold, const RowEntries& entries, double weight_ce, double weight_kd,
                   double temperature, const LossOptions& options, RowGradient* parts, RowBuffers& buffers);

// No more threads than are worth their start for `count` rows: one takes longer to start than 2^17 exponentials.
inline std::size_t workers_for(std::size_t count, std::size_t exponentials_per_row, int threads) {
    const std::size_t useful = std::max<std::size_t>(1, count * exponentials_per_row / (1 << 17));
    return std::min({static_cast<std::size_t>(std::max(threads, 1)), useful, std::max<std::size_t>(count, 1)});
}

// Calls part(worker, first, last) on shares of `count` rows, in torch's threads. `part` must not throw.
template <typename Part>
void over_rows(std::size_t count, std::size_t workers, const Part& part) {
    in_torch_threads(workers, [&](std::size_t w) { part(w, count * w / workers, count * (w + 1) / workers); });
}

}  // namespace profuser
