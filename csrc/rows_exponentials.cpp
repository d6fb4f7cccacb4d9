// Passes over one row of logits: exponentials and their sums, and the scaling that makes a gradient of them.
//
// They take the place of torch's passes (maximum, difference, exponential, sum, product) over a chunk that does not fit the cache: a
// row does, so that memory is read and written once. The loops are written over lanes, which compilers turn into vector instructions;
// with GCC on Linux one build holds a variant for each generation of x86-64, and the loader takes the machine's own.

#include "rows.h"

#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define PROFUSER_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PROFUSER_CLONES
#endif

namespace profuser {

namespace {

constexpr std::size_t kLanes = 16;
// So many columns are summed in fp32 before they are added to a sum in fp64.
constexpr std::size_t kBlock = 1024;
// exp is 0 below: its result would not be a normal number.
constexpr float kLowest = -87.3f;
// Maxima start here and not at -inf, as in kernels/common.py: where all columns are -inf, -inf - -inf would be NaN.
constexpr float kNoMaximum = -1e30f;

// Sixteen numbers at a time. Compilers split them where the machine's vectors are shorter.
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));

#define PROFUSER_INLINE inline __attribute__((always_inline))

PROFUSER_INLINE Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// The first `count` numbers, and `rest` behind them.
PROFUSER_INLINE Floats load_some(const float* from, std::size_t count, float rest) {
    Floats x = rest - Floats{};
    std::memcpy(&x, from, count * sizeof(float));
    return x;
}

// exp(x) for x <= 0 to about an ulp: 2^n · exp(r), with |r| <= ln(2)/2 and exp(r) by a polynomial of degree 6 (Cephes' expf). A NaN
// stays one, because comparisons with it are false.
PROFUSER_INLINE Floats exp_of(Floats x) {
    const Floats clamped = x < kLowest ? kLowest - Floats{} : x;
    const Floats shifted = clamped * 1.44269504088896341f + 12582912.0f;  // rounds to an integer, in the low bits
    const Floats n = shifted - 12582912.0f;
    const Floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < kLowest ? Floats{} : p * scale;
}

PROFUSER_INLINE void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

PROFUSER_INLINE double total_of(Floats x) {
    double total = 0.0;
    for (std::size_t j = 0; j < kLanes; ++j) {
        total += x[j];
    }
    return total;
}

// At -inf the exponential is 0, and so must be its product with the distance.
PROFUSER_INLINE Floats distance(Floats x) { return x < kLowest ? Floats{} : -x; }

}  // namespace

PROFUSER_CLONES RowSums exp_row(float* row, std::size_t columns, bool with_spread, float* at_T, float inverse_T) {
    const std::size_t whole = columns / kLanes * kLanes, rest = columns - whole;
    Floats highest = load_some(row + whole, rest, kNoMaximum);
    highest = highest > kNoMaximum ? highest : kNoMaximum - Floats{};
    for (std::size_t i = 0; i < whole; i += kLanes) {
        const Floats x = load(row + i);
        highest = x > highest ? x : highest;
    }
    float top = kNoMaximum;
    for (std::size_t j = 0; j < kLanes; ++j) {
        top = std::max(top, highest[j]);
    }

    double total = 0.0, total_T = 0.0, spread = 0.0;
    for (std::size_t block = 0; block < whole; block += kBlock) {
        const std::size_t end = std::min(block + kBlock, whole);
        Floats sums{}, sums_T{}, spreads{};
        for (std::size_t i = block; i < end; i += kLanes) {
            const Floats x = load(row + i) - top, e = exp_of(x);
            store(row + i, e);
            sums += e;
            if (with_spread) {
                spreads += e * distance(x);
            }
            if (at_T != nullptr) {
                const Floats e_T = exp_of(x * inverse_T);
                store(at_T + i, e_T);
                sums_T += e_T;
            }
        }
        total += total_of(sums);
        total_T += total_of(sums_T);
        spread += total_of(spreads);
    }
    const Floats x = load_some(row + whole, rest, -std::numeric_limits<float>::infinity()) - top, e = exp_of(x);
    std::memcpy(row + whole, &e, rest * sizeof(float));
    total += total_of(e);
    if (with_spread) {
        spread += total_of(e * distance(x));
    }
    if (at_T != nullptr) {
        const Floats e_T = exp_of(x * inverse_T);
        std::memcpy(at_T + whole, &e_T, rest * sizeof(float));
        total_T += total_of(e_T);
    }
    const float sum = static_cast<float>(total);
    return {top, sum, at_T == nullptr ? sum : static_cast<float>(total_T), static_cast<float>(spread)};
}

PROFUSER_CLONES void scale_row(float* row, std::size_t columns, float factor, const float* at_T, float factor_T, float shift) {
    if (at_T == nullptr) {
        for (std::size_t i = 0; i < columns; ++i) {
            row[i] = row[i] * factor + shift;
        }
        return;
    }
    for (std::size_t i = 0; i < columns; ++i) {
        row[i] = row[i] * factor + at_T[i] * factor_T + shift;
    }
}

PROFUSER_CLONES void add_mass(float* mass, const float* row, std::size_t columns, float factor) {
    const float size = factor < 0 ? -factor : factor;
    for (std::size_t i = 0; i < columns; ++i) {
        mass[i] += size * row[i];
    }
}

PROFUSER_CLONES double sum_row(const float* row, std::size_t columns) {
    const std::size_t whole = columns / kLanes * kLanes;
    double total = total_of(load_some(row + whole, columns - whole, 0.0f));
    for (std::size_t block = 0; block < whole; block += kBlock) {
        const std::size_t end = std::min(block + kBlock, whole);
        Floats sums{};
        for (std::size_t i = block; i < end; i += kLanes) {
            sums += load(row + i);
        }
        total += total_of(sums);
    }
    return total;
}

}  // namespace profuser
