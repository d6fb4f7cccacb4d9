// What the sources say of one row, made ready to be compared with the target's logits. kernels/kept.py does the same in torch and explains
// each step; the names are the same here.

#include "rows.h"

#include <cmath>
#include <limits>

namespace profuser {

namespace {

constexpr double kLowest = -1e30;  // maxima start here, as in kernels/common.py

// The smaller and the greater of two numbers; NaN where x is NaN, as in torch.
double at_most(double x, double limit) { return x > limit ? limit : x; }
double at_least(double x, double limit) { return x < limit ? limit : x; }

// Brings the entries in the order of their ids, and adds those of equal ids up. The slots that get free hold -1 and 0.
void merge_equal(Entry* entries, std::size_t count) {
    std::sort(entries, entries + count, [](const Entry& a, const Entry& b) { return a.id < b.id; });
    std::size_t runs = 0;
    for (std::size_t j = 0; j < count; ++j) {
        if (runs > 0 && entries[runs - 1].id == entries[j].id) {
            entries[runs - 1].p += entries[j].p;
        } else {
            entries[runs++] = entries[j];
        }
    }
    std::fill(entries + runs, entries + count, Entry{-1, 0});
}

}  // namespace

void keep_entries(const GivenEntries& given, std::int64_t label, const TailRule& rule, const KeptEntries& kept, EntryBuffers& buffers) {
    const std::size_t W = given.W, K = given.K, L = W * K, slots = L + 1;
    for (std::size_t w = 0; w < W; ++w) {
        Entry* entries = buffers.entries.data() + w * K;
        const std::int64_t* ids = given.ids + w * K;
        const double* log_p = given.log_p + w * K;

        // p relative to the largest, of equal ids together. A NaN makes all of the source's numbers NaN.
        double top = kLowest;
        for (std::size_t j = 0; j < K; ++j) {
            top = ids[j] >= 0 && (log_p[j] > top || std::isnan(log_p[j])) ? log_p[j] : top;
        }
        for (std::size_t j = 0; j < K; ++j) {
            entries[j] = {ids[j], ids[j] >= 0 || std::isnan(top) ? std::exp(log_p[j] - top) : 0};
        }
        merge_equal(entries, K);
        double relative = 0;
        for (std::size_t j = 0; j < K; ++j) {
            relative += entries[j].p;
        }
        const bool present = relative != 0;
        const double mass = relative * std::exp(top);
        kept.mass[w] = mass;
        kept.present[w] = present;

        // The tail t and what it leaves to the entries.
        double t = 0, share = 1;
        if (rule.bucket && given.tail == nullptr) {
            t = at_least(1 - mass, 0);
            share = at_most(mass, 1);
        } else if (rule.bucket) {
            t = at_most(at_least(given.tail[w], 0), 1);
            share = 1 - t;
        }
        if (rule.bucket && rule.tail_floor > 0) {
            t = at_most(at_least(t, rule.tail_floor), 1 - rule.tail_floor);
            share = at_most(at_least(share, rule.tail_floor), 1 - rule.tail_floor);
        }
        std::size_t named = 0;
        for (std::size_t j = 0; j < K; ++j) {
            entries[j].p /= present ? relative : 1;
            if (!present || entries[j].p * share < rule.entry_floor) {
                entries[j].id = -1;
            }
            named += entries[j].id >= 0;
        }
        // Where the ids are the whole vocabulary, no column is left that could hold a tail.
        const bool nothing_outside = named == rule.vocabulary;
        for (std::size_t j = 0; j < K; ++j) {
            entries[j].p *= nothing_outside ? 1 : share;
        }
        buffers.tails[w] = !present ? rule.absent_tail : nothing_outside ? 0 : t;
    }

    // The ids that any source names, once each, and each source's p there.
    std::size_t named = L;
    for (std::size_t j = 0; j < L; ++j) {
        kept.ids[j] = buffers.entries[j].id;
    }
    if (W > 1) {
        std::sort(kept.ids, kept.ids + L);
        named = std::unique(kept.ids, kept.ids + L) - kept.ids;
        std::fill(kept.ids + named, kept.ids + L, -1);
    }
    std::fill(kept.inside, kept.inside + W * L, false);
    buffers.p.assign(W * slots, 0);
    for (std::size_t j = 0; j < L; ++j) {
        const Entry& entry = buffers.entries[j];
        const std::size_t w = j / K;
        if (entry.id >= 0) {
            const std::size_t slot = W == 1 ? j : std::lower_bound(kept.ids, kept.ids + named, entry.id) - kept.ids;
            kept.inside[w * L + slot] = true;
            buffers.p[w * slots + slot] = entry.p;
        }
    }
    for (std::size_t w = 0; w < W; ++w) {
        buffers.p[w * slots + L] = buffers.tails[w];
    }
    for (std::size_t j = 0; j < W * slots; ++j) {
        kept.p[j] = static_cast<float>(buffers.p[j]);
        kept.log_p[j] = static_cast<float>(std::log(buffers.p[j]));
    }
    for (std::size_t j = 0; j < L; ++j) {
        kept.apart[j] = kept.ids[j] >= 0 && kept.ids[j] != label;
    }
}

}  // namespace profuser
