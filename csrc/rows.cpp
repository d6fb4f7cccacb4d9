// The Python module profuser._rows: what a CPU does to rows of logits between the matrix products of the fused loss.
//
// exp_rows takes the place of four passes of torch (maximum, difference, exponential, sum) over a chunk that does not fit the cache:
// a row does, so that memory is read and written once. The loops are written over lanes, which compilers turn into vector
// instructions; with GCC on Linux one build holds a variant for each generation of x86-64, and the loader takes the machine's own.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define PROFUSER_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PROFUSER_CLONES
#endif

namespace py = pybind11;

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

// One row: its maximum, the exponentials relative to it in place, their sum, and, unless `spread` is null, the sum of each times how far
// its number was below the maximum.
PROFUSER_CLONES void exp_row(float* row, std::size_t columns, float* maximum, float* sum, float* spread) {
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

    double total = 0.0, total_spread = 0.0;
    const auto add = [](Floats sums, double& total) {
        for (std::size_t j = 0; j < kLanes; ++j) {
            total += sums[j];
        }
    };
    // At -inf the exponential is 0, and so must be its product.
    const auto below = [](Floats x) { return x < kLowest ? Floats{} : -x; };
    for (std::size_t block = 0; block < whole; block += kBlock) {
        const std::size_t end = std::min(block + kBlock, whole);
        Floats sums{}, spreads{};
        for (std::size_t i = block; i < end; i += kLanes) {
            const Floats x = load(row + i) - top, e = exp_of(x);
            std::memcpy(row + i, &e, sizeof e);
            sums += e;
            if (spread != nullptr) {
                spreads += e * below(x);
            }
        }
        add(sums, total);
        add(spreads, total_spread);
    }
    const Floats x = load_some(row + whole, rest, -std::numeric_limits<float>::infinity()) - top, e = exp_of(x);
    std::memcpy(row + whole, &e, rest * sizeof(float));
    add(e, total);
    *maximum = top;
    *sum = static_cast<float>(total);
    if (spread != nullptr) {
        add(e * below(x), total_spread);
        *spread = static_cast<float>(total_spread);
    }
}

using Numbers = py::array_t<float, py::array::c_style>;

void exp_rows(py::buffer rows, Numbers maxima, Numbers sums, std::optional<Numbers> spreads, int threads) {
    const py::buffer_info info = rows.request(true);
    const py::ssize_t element = sizeof(float);
    if (info.format != py::format_descriptor<float>::format() || info.ndim != 2 || info.strides[1] != element ||
        info.strides[0] % element != 0) {
        throw std::invalid_argument("rows must be a 2-D float32 array whose rows are contiguous");
    }
    const std::size_t count = info.shape[0], columns = info.shape[1];
    const auto fits = [count](const Numbers& x) { return x.ndim() == 1 && static_cast<std::size_t>(x.size()) == count; };
    if (!fits(maxima) || !fits(sums) || (spreads && !fits(*spreads))) {
        throw std::invalid_argument("maxima, sums and spreads must have one number for each of the " + std::to_string(count) + " rows");
    }
    float* data = static_cast<float*>(info.ptr);
    const std::size_t stride = info.strides[0] / element;
    float *highest = maxima.mutable_data(), *totals = sums.mutable_data();
    float* spread = spreads ? spreads->mutable_data() : nullptr;
    py::gil_scoped_release release;
    const auto part = [=](std::size_t first, std::size_t last) {
        for (std::size_t n = first; n < last; ++n) {
            exp_row(data + n * stride, columns, highest + n, totals + n, spread == nullptr ? nullptr : spread + n);
        }
    };
    // A thread takes longer to start than this many exponentials.
    const std::size_t useful = std::max<std::size_t>(1, count * columns / (1 << 17));
    const std::size_t workers = std::min({static_cast<std::size_t>(std::max(threads, 1)), useful, std::max<std::size_t>(count, 1)});
    std::vector<std::thread> others;
    for (std::size_t w = 1; w < workers; ++w) {
        others.emplace_back(part, count * w / workers, count * (w + 1) / workers);
    }
    part(0, count / workers);
    for (std::thread& other : others) {
        other.join();
    }
}

}  // namespace

PYBIND11_MODULE(_rows, module) {
    module.doc() = "Rows of logits on a CPU: see csrc/rows.cpp.";
    module.def("exp_rows", &exp_rows, py::arg("rows"), py::arg("maxima"), py::arg("sums"),
               py::arg("spreads"), py::arg("threads"));
}
