// Dynamic time warping with Levenshtein cost. Equal tokens are compared only once.

#include "dtw.h"

#include <algorithm>
#include <memory>
#include <string_view>
#include <unordered_map>

namespace profuser {

namespace {

// A step back to the previous token on both sides, on the source's side, or on the target's side.
enum Step : std::uint8_t { kDiagonal, kUp, kLeft };

constexpr std::size_t kWordBits = 64;
constexpr std::uint8_t kNotRemembered = 255;  // a cost this large or larger is rare, and is computed again

// The distinct strings of a sequence. Their code points are replaced by 0, 1, 2, ..., which index the table of Distance.
struct Distinct {
    std::vector<std::uint32_t> symbols;
    std::vector<std::size_t> offsets{0};
    std::vector<std::size_t> index;   // the distinct string at each position of the sequence
    std::vector<std::size_t> counts;  // how often each distinct string stands in the sequence

    std::size_t size() const { return counts.size(); }
    const std::uint32_t* begin(std::size_t i) const { return symbols.data() + offsets[i]; }
    const std::uint32_t* end(std::size_t i) const { return symbols.data() + offsets[i + 1]; }
    std::size_t length(std::size_t i) const { return offsets[i + 1] - offsets[i]; }
};

Distinct distinct(Strings strings, const std::vector<std::uint32_t>& alphabet) {
    Distinct out;
    // The key is a view of the string's bytes, because the standard library hashes views of char only.
    std::unordered_map<std::string_view, std::size_t> known;
    out.index.reserve(strings.size);
    for (std::size_t i = 0; i < strings.size; ++i) {
        const std::uint32_t* first = strings.codes + strings.offsets[i];
        const std::uint32_t* last = strings.codes + strings.offsets[i + 1];
        const std::string_view key(reinterpret_cast<const char*>(first), static_cast<std::size_t>(last - first) * sizeof(*first));
        const auto [entry, inserted] = known.try_emplace(key, out.size());
        if (inserted) {
            for (const std::uint32_t* code = first; code != last; ++code) {
                const auto symbol = std::lower_bound(alphabet.begin(), alphabet.end(), *code) - alphabet.begin();
                out.symbols.push_back(static_cast<std::uint32_t>(symbol));
            }
            out.offsets.push_back(out.symbols.size());
            out.counts.push_back(0);
        }
        out.index.push_back(entry->second);
        ++out.counts[entry->second];
    }
    return out;
}

// Levenshtein distances of one string, the pattern, to many others.
class Distance {
public:
    explicit Distance(std::size_t alphabet_size) : where_(alphabet_size, 0) {}

    void set_pattern(const std::uint32_t* begin, const std::uint32_t* end) {
        for (const std::uint32_t* symbol = begin_; symbol != end_; ++symbol) where_[*symbol] = 0;
        begin_ = begin;
        end_ = end;
        if (size() > kWordBits) return;
        for (std::size_t i = 0; i < size(); ++i) where_[begin[i]] |= std::uint64_t{1} << i;
    }

    std::int64_t to(const std::uint32_t* begin, const std::uint32_t* end) {
        if (size() == 0) return end - begin;
        return size() <= kWordBits ? short_to(begin, end) : long_to(begin, end);
    }

private:
    std::size_t size() const { return static_cast<std::size_t>(end_ - begin_); }

    // For a pattern that fits in a word. A column of the table is held in two words: the bits at which its values rise and
    // those at which they fall (Myers 1999, in Hyyrö's form of 2003).
    std::int64_t short_to(const std::uint32_t* begin, const std::uint32_t* end) const {
        const std::uint64_t last = std::uint64_t{1} << (size() - 1);
        std::uint64_t rises = ~std::uint64_t{0};
        std::uint64_t falls = 0;
        std::int64_t distance = static_cast<std::int64_t>(size());
        for (; begin != end; ++begin) {
            const std::uint64_t match = where_[*begin];
            const std::uint64_t diagonal = (((match & rises) + rises) ^ rises) | match | falls;
            std::uint64_t right_rises = falls | ~(diagonal | rises);
            std::uint64_t right_falls = rises & diagonal;
            distance += (right_rises & last) != 0;
            distance -= (right_falls & last) != 0;
            right_rises = (right_rises << 1) | 1;
            right_falls <<= 1;
            rises = right_falls | ~(diagonal | right_rises);
            falls = right_rises & diagonal;
        }
        return distance;
    }

    // For a longer pattern: the table row by row.
    std::int64_t long_to(const std::uint32_t* begin, const std::uint32_t* end) {
        row_.resize(size() + 1);
        for (std::size_t i = 0; i <= size(); ++i) row_[i] = static_cast<std::int64_t>(i);
        for (; begin != end; ++begin) {
            std::int64_t diagonal = row_[0]++;
            for (std::size_t i = 0; i < size(); ++i) {
                const std::int64_t substituted = diagonal + (begin_[i] != *begin);
                diagonal = row_[i + 1];
                row_[i + 1] = std::min({substituted, row_[i] + 1, diagonal + 1});
            }
        }
        return row_[size()];
    }

    const std::uint32_t* begin_ = nullptr;
    const std::uint32_t* end_ = nullptr;
    std::vector<std::uint64_t> where_;  // the positions of each symbol in a short pattern, as bits
    std::vector<std::int64_t> row_;
};

// The costs of a source string and every distinct target string. They are remembered as long as the source string will come
// up again.
class Costs {
public:
    Costs(const Distinct& source, const Distinct& target, std::size_t alphabet_size)
        : source_(source), target_(target), distance_(alphabet_size), left_(source.counts), remembered_(source.size()),
          costs_(target.size()) {}

    const std::vector<std::int64_t>& of(std::size_t s) {
        std::vector<std::uint8_t>& memory = remembered_[s];
        const bool known = !memory.empty();
        --left_[s];
        bool pattern_set = false;
        for (std::size_t t = 0; t < target_.size(); ++t) {
            if (known && memory[t] != kNotRemembered) {
                costs_[t] = memory[t];
                continue;
            }
            if (!pattern_set) distance_.set_pattern(source_.begin(s), source_.end(s));
            pattern_set = true;
            costs_[t] = distance_.to(target_.begin(t), target_.end(t));
        }
        if (left_[s] == 0) {
            std::vector<std::uint8_t>().swap(memory);
        } else if (!known) {
            memory.resize(target_.size());
            for (std::size_t t = 0; t < target_.size(); ++t) {
                memory[t] = static_cast<std::uint8_t>(std::min<std::int64_t>(costs_[t], kNotRemembered));
            }
        }
        return costs_;
    }

private:
    const Distinct& source_;
    const Distinct& target_;
    Distance distance_;
    std::vector<std::size_t> left_;  // how often each source string will still come up
    std::vector<std::vector<std::uint8_t>> remembered_;
    std::vector<std::int64_t> costs_;
};

// All code points of both sides, sorted, each once.
std::vector<std::uint32_t> alphabet_of(Strings source, Strings target) {
    std::vector<std::uint32_t> alphabet(source.codes, source.codes + source.offsets[source.size]);
    alphabet.insert(alphabet.end(), target.codes, target.codes + target.offsets[target.size]);
    std::sort(alphabet.begin(), alphabet.end());
    alphabet.erase(std::unique(alphabet.begin(), alphabet.end()), alphabet.end());
    return alphabet;
}

}  // namespace

std::vector<std::pair<std::int32_t, std::int32_t>> dtw(Strings source, Strings target) {
    const std::size_t n = source.size;
    const std::size_t m = target.size;
    std::vector<std::pair<std::int32_t, std::int32_t>> path;
    if (n == 0 || m == 0) return path;

    const std::vector<std::uint32_t> alphabet = alphabet_of(source, target);
    const Distinct rows = distinct(source, alphabet);
    const Distinct columns = distinct(target, alphabet);
    Costs costs(rows, columns, alphabet.size());
    // total[j] is the cost of the cheapest path to (i - 1, j), and left of the current j already of the one to (i, j).
    std::vector<std::int64_t> total(m);
    const std::unique_ptr<std::uint8_t[]> steps(new std::uint8_t[n * m]);

    // Fill the table row by row, and note the cheapest step back at every pair.
    for (std::size_t i = 0; i < n; ++i) {
        const std::vector<std::int64_t>& cost = costs.of(rows.index[i]);
        std::uint8_t* step = steps.get() + i * m;
        std::int64_t diagonal = total[0];
        step[0] = kUp;
        total[0] = cost[columns.index[0]] + (i > 0 ? total[0] : 0);
        for (std::size_t j = 1; j < m; ++j) {
            const std::int64_t up = total[j];
            const std::int64_t left = total[j - 1];
            std::int64_t best = left;
            step[j] = kLeft;
            if (i > 0) {
                if (up <= best) best = up, step[j] = kUp;
                if (diagonal <= best) best = diagonal, step[j] = kDiagonal;
            }
            total[j] = best + cost[columns.index[j]];
            diagonal = up;
        }
    }

    // Walk back from the last pair to the first.
    std::size_t i = n - 1;
    std::size_t j = m - 1;
    path.reserve(n + m - 1);
    path.emplace_back(static_cast<std::int32_t>(i), static_cast<std::int32_t>(j));
    while (i > 0 || j > 0) {
        const std::uint8_t step = steps[i * m + j];
        if (step != kLeft) --i;
        if (step != kUp) --j;
        path.emplace_back(static_cast<std::int32_t>(i), static_cast<std::int32_t>(j));
    }
    std::reverse(path.begin(), path.end());
    return path;
}

}  // namespace profuser
