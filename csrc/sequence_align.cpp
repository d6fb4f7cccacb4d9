// Matches each target token with the source token whose distribution it can take, because both follow the same bytes.

#include "align.h"

#include <algorithm>

namespace profuser {

namespace {

std::int32_t clipped_begin(Spans spans, std::size_t i) { return std::max(spans.begin[i], 0); }

}  // namespace

std::size_t first_unordered_span(Spans spans) {
    for (std::size_t i = 0; i < spans.size; ++i) {
        const bool backwards = i > 0 && clipped_begin(spans, i) < clipped_begin(spans, i - 1);
        if (backwards || spans.end[i] < clipped_begin(spans, i)) return i;
    }
    return spans.size;
}

void match_spans(Spans target, Spans source, std::uint8_t* kind, std::int32_t* source_position) {
    std::size_t first = 0;  // the first source token that begins at or after this target token
    std::size_t order = 0;  // the place of this target token among those that begin at the same byte
    for (std::size_t t = 0; t < target.size; ++t) {
        const std::int32_t begin = clipped_begin(target, t);
        order = t > 0 && clipped_begin(target, t - 1) == begin ? order + 1 : 0;
        while (first < source.size && clipped_begin(source, first) < begin) ++first;

        if (first < source.size && clipped_begin(source, first) == begin) {
            const std::size_t wanted = first + order;
            const bool counterpart = wanted < source.size && clipped_begin(source, wanted) == begin;
            const std::size_t row = counterpart ? wanted : first;
            kind[t] = source.end[row] == target.end[t] ? kSameSpan : kSharedPrefix;
            source_position[t] = static_cast<std::int32_t>(row);
        } else if (first > 0 && source.end[first - 1] > begin) {
            kind[t] = kInside;
            source_position[t] = static_cast<std::int32_t>(first - 1);
        } else {
            kind[t] = kSkipped;
            source_position[t] = -1;
        }
    }
}

}  // namespace profuser
