// Dynamic time warping of two token sequences with Levenshtein cost, by which FuseLLM aligns tokens (arXiv 2401.10491). The
// oracle is dtw_python in profuser/alignment/fusellm.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace profuser {

// Strings end to end in UTF-32 code points. String i is codes[offsets[i] .. offsets[i + 1]).
struct Strings {
    const std::uint32_t* codes;
    const std::int64_t* offsets;  // size + 1 offsets that begin at 0 and never fall, which the caller has checked
    std::size_t size;
};

// The cheapest path from (0, 0) to (n - 1, m - 1) as pairs (source, target). It is empty if one of the sequences is empty.
// Of equally cheap steps back, the diagonal one is preferred, then the one to the previous source token, then the one to the
// previous target token. The steps take n * m bytes of memory, remembered costs take at most half as much, and everything
// else is linear in the input.
std::vector<std::pair<std::int32_t, std::int32_t>> dtw(Strings source, Strings target);

}  // namespace profuser
