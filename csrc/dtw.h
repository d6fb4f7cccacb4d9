// Dynamic time warping of two token sequences with Levenshtein cost, as FuseLLM aligns tokens (arXiv 2401.10491). The
// oracle is dtw_python in profuser/alignment/fusellm.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace profuser {

// Strings one after another: string i is codes[offsets[i] .. offsets[i + 1]), in UTF-32 code points.
struct Strings {
    const std::uint32_t* codes;
    const std::int64_t* offsets;  // size + 1, from 0, never falling; the caller checks it
    std::size_t size;
};

// The cheapest path from (0, 0) to (n - 1, m - 1) as pairs (source, target), in that order; empty when a sequence is.
// Of equally cheap steps back the diagonal one is taken, then the one to the previous source token, then to the previous
// target token. Memory: n * m bytes for the steps, at most half as much for remembered costs, the rest linear in the input.
std::vector<std::pair<std::int32_t, std::int32_t>> dtw(Strings source, Strings target);

}  // namespace profuser
