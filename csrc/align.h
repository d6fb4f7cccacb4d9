// Alignment of two tokenizations of one response, on bytes. Knows nothing of models, tokenizers or Python;
// bindings.cpp is the only file that does. The oracle of every function is its Python twin in
// profuser/alignment/spans.py.
//
// Spans are [begin, end) byte offsets relative to the response, in token order; begins below 0 (template, dummy space) are
// clipped at 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace profuser {

// The order is that of KINDS in profuser/alignment/types.py.
enum Kind : std::uint8_t { kSameSpan = 0, kSharedPrefix = 1, kInside = 2, kSkipped = 3 };

struct Spans {
    const std::int32_t* begin;
    const std::int32_t* end;
    std::size_t size;
};

// Index of the first span that is not monotone (begin below the previous one's, or end before begin); size when all are.
std::size_t first_unordered_span(Spans spans);

// Per target token which source token its distribution can come from: the one that begins at the same byte (several at one
// offset match by order, one too many takes the first), for kInside the one that holds that byte, else -1.
// Linear in target.size + source.size; both must be ordered. Writes target.size entries of each output.
void match_spans(Spans target, Spans source, std::uint8_t* kind, std::int32_t* source_position);

}  // namespace profuser
