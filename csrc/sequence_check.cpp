// Checks one sequence before it is aligned. See sequence_check.h.

#include "sequence_check.h"

#include <algorithm>

namespace profuser {

namespace {

constexpr float kMostLogprob = 1e-3F;  // a sum in float32 may end slightly above 0

}  // namespace

// The bytes in quotes, for an error message.
std::string shown(std::string_view bytes) {
    constexpr char digits[] = "0123456789abcdef";
    std::string text = "'";
    for (const unsigned char c : bytes.substr(0, 40)) {
        if (c >= 0x20 && c < 0x7F) {
            text += static_cast<char>(c);
        } else {
            text += std::string("\\x") + digits[c >> 4] + digits[c & 15];
        }
    }
    return text + "'";
}

void check_arrays(const Sequence& q, const Vocabulary& target) {
    if (q.target_size < q.start + q.target.size || q.target_size - q.start != q.target.size) {
        refuse("target spans must be one per token of the response, got " + std::to_string(q.target.size) + " for " +
               std::to_string(q.target_size) + " tokens from " + std::to_string(q.start));
    }
    for (std::size_t t = 0; t < q.target_size; ++t) {
        if (q.target_ids[t] < 0 || q.target_ids[t] >= target.size()) {
            refuse("a target id must be in [0, " + std::to_string(target.size()) + ") (its vocabulary), got " +
                   std::to_string(q.target_ids[t]) + "; encode the response with this tokenizer");
        }
    }
    // Prefixes must not go beyond their positions and must not step back, and must be text. Of their tokens only those in front
    // of the response are checked here, because `check_bytes` checks the others.
    for (std::size_t t = 0; t <= q.target.size; ++t) {
        if (q.prefix_start[t] < 0 || static_cast<std::size_t>(q.prefix_start[t]) > q.start + t) {
            refuse("prefix_start must be in [0, " + std::to_string(q.start + t) + "], got " + std::to_string(q.prefix_start[t]));
        }
        for (std::size_t i = q.prefix_start[t]; t == 0 && i < q.start; ++i) {
            if (!target.is_text(q.target_ids[i])) refuse("a prefix must be text, got token " + std::to_string(q.target_ids[i]));
        }
    }
    for (std::size_t t = 1; t <= q.target.size; ++t) {
        if (q.prefix_start[t] < q.prefix_start[t - 1]) {
            refuse("prefix_start must not descend, got " + std::to_string(q.prefix_start[t]) + " after " +
                   std::to_string(q.prefix_start[t - 1]));
        }
    }
    if (q.target_end >= target.size()) {
        refuse("target_end must be < " + std::to_string(target.size()) + " (the target's vocabulary), got " +
               std::to_string(q.target_end));
    }
    const auto logprobs = [](const float* values, std::size_t size, const char* name) {
        for (std::size_t i = 0; i < size; ++i) {
            if (!(values[i] <= kMostLogprob)) {
                refuse(std::string(name) + " must be natural log-probabilities, got " + std::to_string(values[i]) +
                       "; apply log_softmax, or capture it again");
            }
        }
    };
    logprobs(q.top_logprobs, q.source.size * q.k, "top_logprobs");
    logprobs(q.own_logprobs, q.source.size, "own_logprobs");
    logprobs(q.range_logmass, q.ranges, "ranges.logmass");
    logprobs(q.range_logprobs, q.ranges * q.range_k, "ranges.logprobs");
    // Prefix ranges must be sorted, because they are searched.
    for (std::size_t r = 0; r < q.ranges; ++r) {
        const std::int32_t row = q.range_rows[r], strip = q.range_strip[r];
        const bool there = row >= 0 && static_cast<std::size_t>(row) < q.source.size && strip >= kNumbers;
        const bool ascends = r == 0 || row > q.range_rows[r - 1] || (row == q.range_rows[r - 1] && strip > q.range_strip[r - 1]);
        if (!there || !ascends) {
            refuse("a prefix range must belong to one of " + std::to_string(q.source.size) +
                   " rows, have bytes and come in order, got row " + std::to_string(row) + " with " + std::to_string(strip) +
                   " bytes; capture it again");
        }
    }
}

void check_bytes(const Vocabulary& vocabulary, std::int32_t first_number, const std::int32_t* ids, Spans spans,
                 std::string_view response, const char* name, std::vector<std::int32_t>& clip) {
    const auto n = static_cast<std::int64_t>(response.size());
    std::int64_t reached = 0;
    clip.resize(spans.size);
    for (std::size_t i = 0; i < spans.size; ++i) {
        const std::int64_t first = std::max(spans.begin[i], 0), end = spans.end[i], inside = std::min(end, n);
        const bool text = vocabulary.is_text(ids[i]) && ids[i] < first_number;
        const std::string_view piece = text ? vocabulary.piece(ids[i]) : std::string_view();
        const std::int64_t size = static_cast<std::int64_t>(piece.size()), before = size - (end - first);
        if (!text || before < 0 || first != reached || first > inside ||
            piece.substr(before, inside - first) != response.substr(first, inside - first)) {
            refuse("a " + std::string(name) + " token must hold the response's bytes [" + std::to_string(first) + ", " +
                   std::to_string(end) + "), token " + std::to_string(ids[i]) + " is " + shown(piece) +
                   "; encode the response again with this tokenizer");
        }
        clip[i] = static_cast<std::int32_t>(before);
        reached = std::max<std::int64_t>(end, 0);
    }
    if (reached < n) {
        refuse("the " + std::string(name) + "'s tokens must reach the response's end, byte " + std::to_string(n) + ", got " +
               std::to_string(reached) + "; encode it again");
    }
}

}  // namespace profuser
