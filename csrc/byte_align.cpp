// Applies the rules of the alignment to one sequence after the other: candidates, gold paths and merged mass. See
// byte_align.h.

#include "byte_align.h"
#include "sequence_check.h"
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <mutex>
#include <stdexcept>

namespace profuser {

// Aligns sequences, one after the other, while nobody writes to the aligner's cache.
class ByteAligner::Worker {
  public:
    explicit Worker(const ByteAligner& aligner)
        : aligner_(aligner), target_(aligner.target_), source_(aligner.source_), settings_(aligner.settings_) {}

    void run(const Sequence& sequence, Output& out);

    std::vector<Missing> missing;

  private:
    // The candidates of a source's position and their log-probabilities. At most one of them is the own token. In a range, ids
    // are spelt as in the maps of merging.py.
    struct Row {
        const std::int32_t* ids;
        const float* logprobs;
        std::size_t k;
        bool is_range = false;
    };
    // Looks up what candidates count for behind one prefix. The context is found once for all candidates, and what is missing
    // is collected in one place.
    class Lookup;
    static constexpr std::size_t kNone = static_cast<std::size_t>(-1);

    // Adds the mass of all candidates that speak of target position t: those of source position j, then those of its gold
    // path. Returns kAligned or the reason to skip, and writes the exact mass.
    std::uint8_t add_path(const Sequence& q, std::size_t t, std::size_t j, bool inside, double& exact);
    // Adds the mass of the candidates at the source's end of turn, which is its row `rows`.
    void add_end(const Sequence& q, std::size_t rows);
    // The range of a row that has this strip, or kNone.
    std::size_t range_of(const Sequence& q, std::size_t row, std::int32_t strip) const;
    Row row_of_range(const Sequence& q, std::size_t range) const {
        return {q.range_ids + range * q.range_k, q.range_logprobs + range * q.range_k, q.range_k, true};
    }
    // The ends of turn among a row's candidates.
    Row ends_of(const Row& row);
    // The probability with which a digit is taken to follow the candidates of row j, 1 if it is not known (rule 8).
    double goes_on(const Sequence& q, std::size_t j) const;
    // Adds the mass of a row's candidates other than the own token, times `weight`, for what they count for behind the prefix
    // of target position t and `extension`. `strip` is the number of a candidate's bytes that stand before the position. If the
    // row's numbers were `followed`, its candidates that consist of digits are left out.
    void add_row(const Sequence& q, std::size_t t, const Row& row, std::int32_t own, double weight, std::string_view extension,
                 std::size_t strip, bool turn_may_end, double share, bool followed = false);
    // Adds the mass of the gold token, whose own tokens have the probability `weight`, and of the digits that the target would
    // merge with it, which are in a range of the row behind them, or in `followed`, the range of the numbers that were followed.
    void add_digits_behind(const Sequence& q, std::size_t t, std::size_t range, std::size_t followed, double weight, double share);
    // The share of a candidate's mass that counts for `token`, because no digit follows with which it would change.
    double finished(Lookup& lookup, std::int32_t candidate, std::int32_t token, std::size_t extension, std::size_t strip,
                    double share);
    // The same where both models have the same token of the same tokenizer. Every candidate counts for itself there.
    void add_unchanged(const Row& row, std::int32_t own);
    // Adds mass to a target token.
    void add(std::int32_t token, double mass);
    // Adds the mass of a candidate to what it counts for.
    void count(std::int32_t counts_for, double mass);
    // Keeps the top k of the position's mass. Returns kAligned or the reason to skip.
    std::uint8_t keep(double exact, Output& out, std::size_t t);

    const ByteAligner& aligner_;
    const Vocabulary &target_, &source_;
    const Settings& settings_;
    std::vector<std::int32_t> target_clip_, source_clip_;
    std::string key_;
    std::vector<std::size_t> first_range_;  // the first range of each row, and the number of ranges
    std::vector<std::int32_t> end_ids_;
    std::vector<float> end_logprobs_;
    std::vector<std::pair<std::int32_t, double>> counted_;
    // The current position: the mass of each target token, the dropped mass, and the target's end of turn.
    std::vector<std::pair<std::int32_t, double>> mass_;
    double dropped_ = 0.0;
    std::int32_t end_ = -1;
};

void ByteAligner::Worker::add(std::int32_t token, double mass) {
    for (auto& [known, sum] : mass_) {
        if (known == token) {
            sum += mass;
            return;
        }
    }
    mass_.emplace_back(token, mass);
}

void ByteAligner::Worker::count(std::int32_t counts_for, double mass) {
    if (counts_for == kEnd) counts_for = end_;  // -1, which is the tail, where the target has no end of turn
    if (counts_for == kDropped) {
        dropped_ += mass;
    } else if (counts_for >= 0) {
        add(counts_for, mass);
    }
}

class ByteAligner::Worker::Lookup {
  public:
    Lookup(Worker& worker, const Sequence& q, std::size_t t, std::string_view extension, std::size_t strip)
        : size(q.start + t - q.prefix_start[t]),
          prefix(q.target_ids + q.prefix_start[t]),
          worker_(worker),
          parts_{size, extension, strip} {}

    // What a candidate counts for, or nothing if that is not known yet.
    const std::int32_t* find(std::int32_t wanted) {
        if (!looked_up_) {
            write_key(worker_.key_, prefix, parts_);
            const auto found = worker_.aligner_.contexts_.find(worker_.key_);
            if (found != worker_.aligner_.contexts_.end()) context_ = &found->second;
            looked_up_ = true;
        }
        if (const std::int32_t* known = context_ ? context_->find(wanted) : nullptr) return known;
        if (!asked_) asked_ = &worker_.missing.emplace_back(Missing{worker_.key_, {}});
        asked_->candidates.push_back(wanted);
        return nullptr;
    }

    const std::size_t size;  // the number of the prefix's tokens
    const std::int32_t* const prefix;

  private:
    Worker& worker_;
    Key parts_;
    const Context* context_ = nullptr;
    bool looked_up_ = false;
    Missing* asked_ = nullptr;
};

std::size_t ByteAligner::Worker::range_of(const Sequence& q, std::size_t row, std::int32_t strip) const {
    if (row + 1 >= first_range_.size()) return kNone;
    for (std::size_t r = first_range_[row]; r < first_range_[row + 1]; ++r) {
        if (q.range_strip[r] == strip) return r;
    }
    return kNone;
}

ByteAligner::Worker::Row ByteAligner::Worker::ends_of(const Row& row) {
    end_ids_.clear();
    end_logprobs_.clear();
    for (std::size_t i = 0; i < row.k; ++i) {
        if (row.ids[i] < 0 || row.ids[i] >= source_.size() || !settings_.source_ends[row.ids[i]]) continue;
        end_ids_.push_back(row.ids[i]);
        end_logprobs_.push_back(row.logprobs[i]);
    }
    return {end_ids_.data(), end_logprobs_.data(), end_ids_.size()};
}

double ByteAligner::Worker::goes_on(const Sequence& q, std::size_t j) const {
    const std::int32_t own = q.source_ids[j];
    if (!settings_.merges_digits || own < 0 || own >= source_.size() || !aligner_.candidates_[own].ends_in_digit) return 1.0;
    const std::size_t range = range_of(q, j + 1, kDigits);
    // Halfway between the own token's probability and 1, see the rule.
    return range == kNone ? 1.0 : (1.0 + std::min(std::exp(static_cast<double>(q.range_logmass[range])), 1.0)) / 2.0;
}

double ByteAligner::Worker::finished(Lookup& lookup, std::int32_t candidate, std::int32_t token, std::size_t extension,
                                     std::size_t strip, double share) {
    if (!settings_.merges_digits || token < 0 || !aligner_.candidates_[candidate].ends_in_digit ||
        target_.piece(token).size() != extension + source_.piece(candidate).size() - strip) {
        return 1.0;
    }
    const std::int32_t* onward = lookup.find(candidate + source_.size());
    return onward ? 1.0 - share * *onward / 10.0 : 1.0;
}

void ByteAligner::Worker::add_row(const Sequence& q, std::size_t t, const Row& row, std::int32_t own, double weight,
                                  std::string_view extension, std::size_t strip, bool turn_may_end, double share,
                                  bool followed) {
    Lookup lookup(*this, q, t, extension, strip);
    // A plain candidate begins exactly at the target's position. Behind a token that closes, a plain candidate that opens
    // begins a new pre-token.
    const bool plain = strip == 0 && extension.empty();
    const bool may_close = plain && lookup.size > 0 && settings_.closes[lookup.prefix[lookup.size - 1]];
    for (std::size_t i = 0; i < row.k; ++i) {
        std::int32_t candidate = row.ids[i];
        if (candidate < 0) continue;
        const double mass = weight * std::exp(static_cast<double>(row.logprobs[i]));
        if (row.is_range && candidate < target_.size()) {
            // A target token whose mass was merged before the cut (rule 7).
            const std::string_view piece = target_.piece(candidate);
            const bool digit = !piece.empty() && piece[0] >= '0' && piece[0] <= '9';
            const std::int32_t* stays = lookup.size ? lookup.find(digit ? kClosedByDigit : kClosed) : nullptr;
            if (lookup.size == 0 || (stays && *stays)) {
                count(candidate, mass);
            } else if (stays) {
                count(kDropped, mass);
            }
            continue;
        }
        if (row.is_range) candidate -= target_.size();
        if (row.is_range && candidate == source_.size()) {
            if (const std::int32_t* known = lookup.find(kCut)) count(*known, mass);
            continue;
        }
        // A model may pad its logits, and such ids are no numbers.
        if (candidate == own || candidate >= (row.is_range ? source_.size() : settings_.first_number)) continue;
        const auto [table, role, ends_in_digit, is_digits] = aligner_.candidates_[candidate];
        if (followed && is_digits) continue;
        // Control tokens, and the ids with which models pad their logits, stay in the tail. So does a token that ends where
        // the position begins (rule 2).
        if (role == Role::kNone) continue;
        if (strip > 0 && source_.piece(candidate).size() == strip) continue;
        // Some candidates can be counted without their own entry in the cache: an end of turn by role, and text that begins a
        // new pre-token by the table.
        std::int32_t wanted = candidate;
        if (role == Role::kEnd) {
            if (turn_may_end) {
                count(kEnd, mass);
                continue;
            }
            wanted = kAnyEnd;
        } else if (plain && lookup.size == 0 && role != Role::kNumber) {
            count(table, mass * (1.0 - share * settings_.onward[candidate] / 10.0));
            continue;
        } else if (may_close && role == Role::kOpens) {
            const std::int32_t* closed = lookup.find(kClosed);
            if (!closed) continue;
            if (*closed) {
                count(table, mass * (1.0 - share * settings_.onward[candidate] / 10.0));
                continue;
            }
        }
        if (const std::int32_t* known = lookup.find(wanted)) {
            const std::int32_t token = *known;
            count(token, mass * (wanted < 0 ? 1.0 : finished(lookup, candidate, token, extension.size(), strip, share)));
        }
    }
}

void ByteAligner::Worker::add_digits_behind(const Sequence& q, std::size_t t, std::size_t range, std::size_t followed,
                                            double weight, double share) {
    const std::int32_t gold = q.target_ids[q.start + t];
    const std::string_view extension = target_.piece(gold);
    Lookup lookup(*this, q, t, extension, 0);
    // The tokens that the candidates count for. If none changes the gold token, the number may go on behind it.
    bool changes = false;
    counted_.clear();
    for (const std::size_t of : {range, followed}) {
        if (of == kNone) continue;
        const Row row = row_of_range(q, of);
        for (std::size_t i = 0; i < row.k; ++i) {
            const std::int32_t candidate = row.ids[i] - target_.size();
            if (row.ids[i] < target_.size() || candidate >= source_.size()) continue;
            if (followed != kNone && aligner_.candidates_[candidate].is_digits) continue;
            const std::int32_t* known = lookup.find(candidate);
            const std::int32_t token = known ? *known : kTail;
            changes |= known && token != gold;
            const double mass = weight * std::exp(static_cast<double>(row.logprobs[i]));
            counted_.emplace_back(token, mass * finished(lookup, candidate, token, extension.size(), 0, share));
        }
    }
    const double exact = std::exp(static_cast<double>(q.range_logmass[range]));
    add(gold, changes ? weight * std::max(0.0, 1.0 - exact) : weight);
    for (std::size_t i = 0; changes && i < counted_.size(); ++i) count(counted_[i].first, counted_[i].second);
}

void ByteAligner::Worker::add_unchanged(const Row& row, std::int32_t own) {
    for (std::size_t i = 0; i < row.k; ++i) {
        const std::int32_t candidate = row.ids[i];
        if (candidate < 0 || candidate == own) continue;
        const double mass = std::exp(static_cast<double>(row.logprobs[i]));
        if (candidate < source_.size() && settings_.source_ends[candidate]) {
            count(kEnd, mass);
        } else if (target_.is_text(candidate) && !target_.piece(candidate).empty()) {
            add(candidate, mass);
        }
    }
}

std::uint8_t ByteAligner::Worker::add_path(const Sequence& q, std::size_t t, std::size_t j, bool inside, double& exact) {
    const std::int32_t gold = q.target_ids[q.start + t];
    const std::string_view piece = target_.piece(gold), own_piece = source_.piece(q.source_ids[j]);
    const std::int32_t begin = std::max(q.target.begin[t], 0);
    // Bytes beyond the response belong to the target's template and are part of no label.
    const std::int32_t end = std::min<std::int64_t>(q.target.end[t], q.response.size());
    const std::string_view clip = piece.substr(0, target_clip_[t]);  // the bytes that the target's token has in front
    // Candidates must begin with the first `strip` bytes of the source's token (rules 2 and 6).
    std::size_t strip = 0;
    Row row{q.top_ids + j * q.k, q.top_logprobs + j * q.k, q.k};
    if (inside) {
        strip = source_clip_[j] + begin - std::max(q.source.begin[j], 0);
    } else if (own_piece.substr(0, source_clip_[j]) != clip) {
        strip = source_clip_[j];
    } else if (settings_.same_tokens && q.source.end[j] == q.target.end[t] && q.source_ids[j] == gold) {
        add(gold, std::exp(static_cast<double>(q.own_logprobs[j])));
        add_unchanged(row, q.source_ids[j]);
        return kAligned;
    }
    if (strip > 0) {
        // Take the candidates from the prefix range instead of the row.
        const std::size_t range = range_of(q, j, static_cast<std::int32_t>(strip));
        if (range == kNone) return kNoPrefixRange;
        row = row_of_range(q, range);
        for (std::size_t i = 0; i < row.k; ++i) {
            const std::int32_t candidate = row.ids[i] - target_.size();
            if (row.ids[i] < target_.size() || candidate == source_.size()) continue;
            if (!source_.is_text(candidate) || source_.piece(candidate).substr(0, strip) != own_piece.substr(0, strip)) {
                refuse("a prefix range's tokens must begin with " + shown(own_piece.substr(0, strip)) + ", got token " +
                       std::to_string(candidate) + "; capture it again");
            }
        }
        exact = std::exp(static_cast<double>(q.range_logmass[range]));
    }
    // Bytes that both tokens have in front are already part of every candidate.
    std::string_view extension = source_clip_[j] > 0 && strip == 0 ? std::string_view() : clip;
    // Follow the gold path (rule 4). `weight` is the probability of the own tokens so far.
    double weight = 1.0;
    while (true) {
        const bool turn_may_end = q.source.begin[j] <= begin;
        const std::size_t whole = strip == 0 ? range_of(q, j, kWhole) : kNone;
        const std::size_t numbers = strip == 0 ? range_of(q, j, kNumbers) : kNone;
        const auto add_candidates = [&](const Row& of, bool followed) {
            add_row(q, t, of, q.source_ids[j], weight, extension, strip, turn_may_end, goes_on(q, j), followed);
        };
        if (whole != kNone) {
            // The row was merged over the whole vocabulary. Ends of turn have no bytes, so they are not among the merged.
            add_candidates(row_of_range(q, whole), numbers != kNone);
            row = ends_of(row);
        }
        add_candidates(row, numbers != kNone);
        if (numbers != kNone) add_candidates(row_of_range(q, numbers), false);
        weight *= std::exp(static_cast<double>(q.own_logprobs[j]));
        if (q.source.end[j] >= end) break;
        // There is a next source token, because the last one ends where the response ends. It must not have a dummy space.
        ++j;
        if (source_clip_[j] > 0) return kNoPrefixRange;
        row = {q.top_ids + j * q.k, q.top_logprobs + j * q.k, q.k};
        strip = 0;
        extension = piece.substr(0, target_clip_[t] + q.source.begin[j] - begin);
    }
    // Behind a gold token that ends in a digit, the digits that the target would merge with it are candidates (rule 8).
    const bool ends_together = settings_.merges_digits && q.source.end[j] == q.target.end[t];
    const std::size_t digits = ends_together ? range_of(q, j + 1, kDigits) : kNone;
    if (digits == kNone) {
        add(gold, weight);
    } else {
        add_digits_behind(q, t, digits, range_of(q, j + 1, kNumbers), weight, goes_on(q, j + 1));
    }
    return kAligned;
}

void ByteAligner::Worker::add_end(const Sequence& q, std::size_t rows) {
    const Row row{q.top_ids + rows * q.k, q.top_logprobs + rows * q.k, q.k};
    const std::int32_t own = q.source_ids[rows];
    add(q.target_end, std::exp(static_cast<double>(q.own_logprobs[rows])));
    if (settings_.same_tokens && settings_.target_closing == settings_.source_closing) {
        add_unchanged(row, own);
    } else if (!settings_.target_closing.empty()) {
        // Text of the target's template stands before its end of turn. The source's other candidates would have to stand
        // before that text, so they say nothing about this position and stay in the tail.
        for (std::size_t i = 0; i < row.k; ++i) {
            const std::int32_t candidate = row.ids[i];
            if (candidate >= 0 && candidate != own && candidate < source_.size() && settings_.source_ends[candidate]) {
                count(kEnd, std::exp(static_cast<double>(row.logprobs[i])));
            }
        }
    } else {
        add_row(q, q.target.size, row, own, 1.0, settings_.source_closing, 0, true, 1.0);
    }
}

// Rule 5.
std::uint8_t ByteAligner::Worker::keep(double exact, Output& out, std::size_t t) {
    double possible = std::max(exact - dropped_, 0.0);
    out.reliability[t] = exact > 0.0 ? static_cast<float>(possible / exact) : 0.0F;
    if (out.reliability[t] < settings_.min_reliability) return kLowReliability;
    mass_.erase(std::remove_if(mass_.begin(), mass_.end(), [](const auto& entry) { return !(entry.second > 0.0); }), mass_.end());
    if (mass_.empty()) return kEmpty;
    const std::size_t kept = std::min<std::size_t>(mass_.size(), settings_.top_k);
    std::partial_sort(mass_.begin(), mass_.begin() + kept, mass_.end(), [](const auto& left, const auto& right) {
        return left.second != right.second ? left.second > right.second : left.first < right.first;
    });
    double sum = 0.0;
    for (std::size_t i = 0; i < kept; ++i) sum += mass_[i].second;
    possible = std::max(possible, sum);  // log-probabilities in float32 may add up to slightly more than the exact mass
    for (std::size_t i = 0; i < kept; ++i) {
        out.ids.push_back(mass_[i].first);
        out.logprobs.push_back(static_cast<float>(std::log(mass_[i].second / possible)));
    }
    out.tail[t] = static_cast<float>(std::max(0.0, 1.0 - sum / possible));
    out.counts[t] = static_cast<std::int64_t>(kept);
    return kAligned;
}

void ByteAligner::Worker::run(const Sequence& q, Output& out) {
    out.ids.clear();
    out.logprobs.clear();
    out.ids.reserve(q.positions() * settings_.top_k);
    out.logprobs.reserve(q.positions() * settings_.top_k);
    check_arrays(q, target_);
    first_range_.assign(q.source.size + 1, 0);
    for (std::size_t r = 0; r < q.ranges; ++r) ++first_range_[q.range_rows[r] + 1];
    for (std::size_t row = 0; row < q.source.size; ++row) first_range_[row + 1] += first_range_[row];
    const auto n = static_cast<std::int64_t>(q.response.size());
    // The source's last row is its end of turn, unless the response was cut.
    std::size_t rows = q.source.size;
    const bool source_has_end = rows > 0 && q.source_ids[rows - 1] >= 0 && q.source_ids[rows - 1] < source_.size() &&
                                settings_.source_ends[q.source_ids[rows - 1]] && q.source.begin[rows - 1] == n &&
                                q.source.end[rows - 1] == n;
    rows -= source_has_end;
    const Spans source{q.source.begin, q.source.end, rows};
    for (const auto& [spans, name] : {std::pair(q.target, "target"), std::pair(source, "source")}) {
        if (const std::size_t i = first_unordered_span(spans); i < spans.size) {
            refuse(std::string(name) + " spans must be monotone with begin <= end, got [" + std::to_string(spans.begin[i]) + ", " +
                   std::to_string(spans.end[i]) + ") at " + std::to_string(i) + "; re-encode the response");
        }
    }
    // Check that the tokens of both sides hold the response's bytes.
    check_bytes(target_, target_.size(), q.target_ids + q.start, q.target, q.response, "target", target_clip_);
    check_bytes(source_, settings_.first_number, q.source_ids, source, q.response, "source", source_clip_);

    // Find the source position for each target position. The target's end of turn gets the source's, by role.
    match_spans(q.target, source, out.kind, out.source_position);
    if (q.target_end >= 0) {
        out.kind[q.target.size] = source_has_end ? kSameSpan : kSkipped;
        out.source_position[q.target.size] = source_has_end ? static_cast<std::int32_t>(rows) : -1;
    }
    // Add up the mass of each position, and keep the top k of it.
    for (std::size_t t = 0; t < q.positions(); ++t) {
        mass_.clear();
        dropped_ = 0.0;
        end_ = t == q.target.size ? q.target_end : settings_.target_end;
        double exact = 1.0;
        std::uint8_t reason = kNoSourcePosition;
        if (out.kind[t] != kSkipped && t == q.target.size) {
            add_end(q, rows);
            reason = kAligned;
        } else if (out.kind[t] != kSkipped) {
            reason = add_path(q, t, out.source_position[t], out.kind[t] == kInside, exact);
        }
        out.counts[t] = 0;
        out.tail[t] = 1.0F;
        out.reliability[t] = 0.0F;
        out.skip_reason[t] = reason == kAligned ? keep(exact, out, t) : reason;
    }
}

void ByteAligner::align(const std::vector<Sequence>& batch, std::vector<Output>& out, unsigned threads) {
    threads = std::max(1U, std::min<unsigned>(threads, static_cast<unsigned>(batch.size())));
    if (!pending_.empty()) clear();  // the cache holds candidates as tail whose texts were asked for and never learnt
    // Align once more if everything that was missing could be found out without the tokenizer.
    while (run(batch, out, threads) && texts_.empty()) {
    }
}

bool ByteAligner::run(const std::vector<Sequence>& batch, std::vector<Output>& out, unsigned threads) {
    // Align the sequences in threads. If several are refused, the error names the first one, whichever thread was faster.
    std::vector<Worker> workers(threads, Worker(*this));
    std::atomic<std::size_t> next{0};
    std::mutex mutex;
    std::size_t failed = batch.size();
    std::string message;
    std::exception_ptr other;
    const auto work = [&](Worker& worker) {
        for (std::size_t i; (i = next++) < batch.size();) {
            try {
                worker.run(batch[i], out[i]);
            } catch (const std::invalid_argument& error) {
                const std::lock_guard<std::mutex> lock(mutex);
                if (i < failed) {
                    failed = i;
                    message = error.what();
                }
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex);
                other = std::current_exception();
                return;
            }
        }
    };
    in_threads(threads, [&](std::size_t w) { work(workers[w]); });
    if (other) std::rethrow_exception(other);
    if (failed < batch.size()) refuse(message + " (sequence " + std::to_string(failed) + " of the batch)");

    // Put what was missing into the cache.
    bool missing = false;
    for (const Worker& worker : workers) {
        for (const Missing& asked : worker.missing) intern(asked);
        missing |= !worker.missing.empty();
    }
    return missing;
}

}  // namespace profuser
