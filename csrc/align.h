// Matches the tokens of two tokenizations of one response by their bytes. This code knows nothing of models, tokenizers or
// Python; only bindings.cpp and byte_align_bindings.cpp know Python. The oracle of every function is the Python function of
// the same meaning in profuser/alignment/spans.py.
//
// Spans are byte offsets [begin, end) relative to the response, in the order of the tokens. A begin below 0, which a token
// with bytes of the template or with a dummy space has, is set to 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace profuser {

// The order must be that of KINDS in profuser/alignment/types.py.
enum Kind : std::uint8_t { kSameSpan = 0, kSharedPrefix = 1, kInside = 2, kSkipped = 3 };

struct Spans {
    const std::int32_t* begin;
    const std::int32_t* end;
    std::size_t size;
};

// The index of the first span that begins before the previous one or ends before it begins; `size` if there is none.
std::size_t first_unordered_span(Spans spans);

// Finds the source token that each target token's distribution can come from. It is the one that begins at the same byte, or
// for kInside the one that holds this byte, else -1. If several tokens begin at one byte, they are matched in their order,
// and a target token without a counterpart takes the first source token. Both sides must be ordered. The time is linear in
// target.size + source.size. Writes target.size entries of each output.
void match_spans(Spans target, Spans source, std::uint8_t* kind, std::int32_t* source_position);

}  // namespace profuser
