// The Python module profuser._rows, which kernels/rows.py calls. The GIL is released while C++ works.

#include "rows.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

namespace py = pybind11;

namespace {

// Without py::array::forcecast, an array of a wider dtype is an error here, and not a silent copy.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void require(bool fits, const std::string& what) {
    if (!fits) {
        throw std::invalid_argument(what);
    }
}

bool fits(const py::array& x, std::initializer_list<std::size_t> shape) {
    return static_cast<std::size_t>(x.ndim()) == shape.size() &&
           std::equal(shape.begin(), shape.end(), x.shape(), [](std::size_t a, py::ssize_t b) { return a == static_cast<std::size_t>(b); });
}

// Rows of float32 that C++ writes to: contiguous in themselves, with any distance between them.
struct Rows {
    float* data;
    std::size_t count, columns, stride;

    explicit Rows(py::buffer& rows) {
        const py::buffer_info info = rows.request(true);
        const py::ssize_t element = sizeof(float);
        require(info.format == py::format_descriptor<float>::format() && info.ndim == 2 && info.strides[1] == element &&
                    info.strides[0] % element == 0,
                "rows must be a 2-D float32 array whose rows are contiguous");
        data = static_cast<float*>(info.ptr);
        count = info.shape[0];
        columns = info.shape[1];
        stride = info.strides[0] / element;
    }

    float* row(std::size_t n) const { return data + n * stride; }
};

void exp_rows(py::buffer logits, Array<float> maxima, Array<float> sums, std::optional<Array<float>> spreads, int threads) {
    const Rows rows(logits);
    require(fits(maxima, {rows.count}) && fits(sums, {rows.count}) && (!spreads || fits(*spreads, {rows.count})),
            "maxima, sums and spreads must have one number for each of the " + std::to_string(rows.count) + " rows");
    float *highest = maxima.mutable_data(), *totals = sums.mutable_data(), *spread = spreads ? spreads->mutable_data() : nullptr;
    py::gil_scoped_release release;
    const std::size_t workers = profuser::workers_for(rows.count, rows.columns, threads);
    profuser::over_rows(rows.count, workers, [=](std::size_t, std::size_t first, std::size_t last) {
        for (std::size_t n = first; n < last; ++n) {
            const profuser::RowSums of_row = profuser::exp_row(rows.row(n), rows.columns, spread != nullptr, nullptr, 1.0f);
            highest[n] = of_row.maximum;
            totals[n] = of_row.sum;
            if (spread != nullptr) {
                spread[n] = of_row.spread;
            }
        }
    });
}

// ids (C, L), inside (C, W, L), p (C, W, L + 1), log_p (C, W, L + 1), weight (C, W) and apart (C, L), as in kernels/kept.py.
using Entries = std::tuple<Array<std::int64_t>, Array<bool>, Array<float>, Array<float>, Array<float>, Array<bool>>;

// Where RowGradient is written: scalars (C, 3) of dense, dense_T and even; lifted and columns (C, L + 1); at_T (C, V) or None; and mass
// (P, V), of the exponentials at T = 1 and where there are any of those at T.
using Parts = std::tuple<py::buffer, py::buffer, Array<std::int64_t>, std::optional<py::buffer>, std::optional<py::buffer>>;

profuser::Divergence divergence_of(const std::string& name) {
    using profuser::Divergence;
    const std::pair<const char*, Divergence> known[] = {
        {"forward_kl", Divergence::forward_kl}, {"reverse_kl", Divergence::reverse_kl},
        {"jsd", Divergence::jsd},               {"skew_kl", Divergence::skew_kl},
        {"tvd", Divergence::tvd},               {"skew_reverse_kl", Divergence::skew_reverse_kl}};
    for (const auto& [known_name, divergence] : known) {
        if (name == known_name) {
            return divergence;
        }
    }
    throw std::invalid_argument("no divergence is called " + name);
}

void loss_rows(py::buffer logits, Array<std::int64_t> gold, std::optional<Entries> entries, Array<float> weight_ce, Array<float> weight_kd,
               Array<double> temperature, const std::string& divergence, double beta, bool conditional, double label_smoothing,
               double z_loss, bool entropies, bool gradient, py::buffer losses, std::optional<Parts> parts, int threads) {
    const Rows rows(logits), out(losses);
    const std::size_t count = rows.count;
    require(fits(gold, {count}) && fits(weight_ce, {count}) && fits(weight_kd, {count}) && fits(temperature, {count}),
            "gold, weights and temperature must have one number for each of the " + std::to_string(count) + " rows");
    require(out.count == 5 && out.columns == count, "losses must be (5, " + std::to_string(count) + ")");

    profuser::RowEntries first{};
    if (entries) {
        const auto& [ids, inside, p, log_p, weight, apart] = *entries;
        require(inside.ndim() == 3, "inside must be (C, W, L)");
        first.W = inside.shape(1);
        first.L = inside.shape(2);
        require(fits(ids, {count, first.L}) && fits(inside, {count, first.W, first.L}) && fits(p, {count, first.W, first.L + 1}) &&
                    fits(log_p, {count, first.W, first.L + 1}) && fits(weight, {count, first.W}) && fits(apart, {count, first.L}),
                "the entries must be of " + std::to_string(count) + " rows, and of one number of sources and ids");
        first.ids = ids.data();
        first.inside = inside.data();
        first.p = p.data();
        first.log_p = log_p.data();
        first.weight = weight.data();
        first.apart = apart.data();
    }
    const auto known = [&](std::int64_t id) { return id < static_cast<std::int64_t>(rows.columns); };
    const std::int64_t* golds = gold.data();
    require(std::all_of(golds, golds + count, [&](std::int64_t id) { return id >= 0 && known(id); }) &&
                std::all_of(first.ids, first.ids + count * first.L, known),
            "gold and ids must be columns of the " + std::to_string(rows.columns));
    const profuser::LossOptions options{divergence_of(divergence), beta, conditional, label_smoothing, z_loss, entropies, gradient};
    std::optional<Rows> scalars, lifted, at_T, mass;
    std::int64_t* columns = nullptr;
    if (parts) {
        auto& [to_scalars, to_lifted, to_columns, to_at_T, to_mass] = *parts;
        scalars.emplace(to_scalars);
        lifted.emplace(to_lifted);
        columns = to_columns.mutable_data();
        require(scalars->count == count && scalars->columns == 3 && lifted->count == count && lifted->columns == first.L + 1 &&
                    fits(to_columns, {count, first.L + 1}),
                "of each row the parts of the gradient are 3 numbers, and one for each lifted column");
        if (to_at_T) {
            at_T.emplace(*to_at_T);
            require(at_T->count == count && at_T->columns == rows.columns, "exponentials at T must be as many as logits");
        }
        if (to_mass) {
            mass.emplace(*to_mass);
            require(mass->count == (at_T ? 2u : 1u) && mass->columns == rows.columns, "mass must be (P, V)");
        }
    }
    const float *of_ce = weight_ce.data(), *of_kd = weight_kd.data();
    const double* T = temperature.data();

    py::gil_scoped_release release;
    const std::size_t workers = profuser::workers_for(count, rows.columns + first.W * first.L, threads);
    // Each worker adds up masses of its own, which are then added in one order whatever thread was first.
    const std::size_t masses = mass ? mass->count * rows.columns : 0;
    std::vector<float> mass_of_worker(workers * masses, 0.0f);
    const bool needs_at_T = !parts && first.W > 0 && std::any_of(T, T + count, [](double of_row) { return of_row != 1; });
    profuser::RowBuffers buffers;
    buffers.at_T.resize(needs_at_T ? rows.columns : 0);
    buffers.numbers.resize(10 * (first.L + 1));
    std::vector<profuser::RowBuffers> buffers_of_worker(workers, buffers);
    profuser::over_rows(count, workers, [&](std::size_t worker, std::size_t begin, std::size_t end) {
        const std::size_t W = first.W, L = first.L;
        float* own_mass = mass ? mass_of_worker.data() + worker * masses : nullptr;
        for (std::size_t n = begin; n < end; ++n) {
            const profuser::RowEntries of_row{W,
                                              L,
                                              first.ids + n * L,
                                              first.inside + n * W * L,
                                              first.p + n * W * (L + 1),
                                              first.log_p + n * W * (L + 1),
                                              first.weight + n * W,
                                              first.apart + n * L};
            profuser::RowGradient of_parts{};
            if (parts) {
                of_parts.lifted = lifted->row(n);
                of_parts.columns = columns + n * (L + 1);
                of_parts.at_T = at_T ? at_T->row(n) : nullptr;
                of_parts.mass = own_mass;
                of_parts.mass_T = own_mass != nullptr && at_T ? own_mass + rows.columns : nullptr;
            }
            const profuser::RowLosses row = profuser::loss_row(rows.row(n), rows.columns, golds[n], of_row, of_ce[n], of_kd[n], T[n],
                                                               options, parts ? &of_parts : nullptr, buffers_of_worker[worker]);
            if (parts) {
                const float numbers[] = {of_parts.dense, of_parts.dense_T, of_parts.even};
                std::copy(numbers, numbers + 3, scalars->row(n));
            }
            const double values[] = {row.ce, row.learnt, row.kd, row.target_mass, row.entropy};
            for (std::size_t i = 0; i < 5; ++i) {
                out.row(i)[n] = static_cast<float>(values[i]);
            }
        }
    });
    for (std::size_t i = 0; i < masses; ++i) {
        float sum = 0;
        for (std::size_t worker = 0; worker < workers; ++worker) {
            sum += mass_of_worker[worker * masses + i];
        }
        mass->row(i / rows.columns)[i % rows.columns] = sum;
    }
}

// Where KeptEntries are written, in its order: ids (n, L), inside (n, W, L), p and log_p (n, W, L + 1), apart (n, L), mass and present
// (n, W).
using KeptArrays = std::tuple<Array<std::int64_t>, Array<bool>, Array<float>, Array<float>, Array<bool>, Array<double>, Array<bool>>;

void keep_entries(Array<std::int64_t> ids, Array<double> log_p, std::optional<Array<double>> tail, Array<std::int64_t> labels, bool bucket,
                  double absent_tail, double tail_floor, double entry_floor, std::size_t vocabulary, KeptArrays to, int threads) {
    require(ids.ndim() == 3, "ids must be (n, W, K)");
    const std::size_t count = ids.shape(0), W = ids.shape(1), K = ids.shape(2), L = W * K;
    auto& [to_ids, to_inside, to_p, to_log_p, to_apart, to_mass, to_present] = to;
    require(fits(log_p, {count, W, K}) && (!tail || fits(*tail, {count, W})) && fits(labels, {count}),
            "log_p must be (n, W, K), tail (n, W) and labels (n)");
    require(fits(to_ids, {count, L}) && fits(to_inside, {count, W, L}) && fits(to_p, {count, W, L + 1}) &&
                fits(to_log_p, {count, W, L + 1}) && fits(to_apart, {count, L}) && fits(to_mass, {count, W}) &&
                fits(to_present, {count, W}),
            "the results must be of as many rows, sources and ids");
    const profuser::TailRule rule{bucket, absent_tail, tail_floor, entry_floor, vocabulary};
    const profuser::GivenEntries given{W, K, ids.data(), log_p.data(), tail ? tail->data() : nullptr};
    const profuser::KeptEntries kept{to_ids.mutable_data(),   to_inside.mutable_data(), to_p.mutable_data(),      to_log_p.mutable_data(),
                                     to_apart.mutable_data(), to_mass.mutable_data(),   to_present.mutable_data()};
    const std::int64_t* golds = labels.data();

    py::gil_scoped_release release;
    // An entry takes as long as some ten exponentials of a row of logits.
    const std::size_t workers = profuser::workers_for(count, 10 * W * (L + 1), threads);
    profuser::EntryBuffers buffers;
    buffers.entries.resize(L);
    buffers.p.resize(W * (L + 1));
    buffers.tails.resize(W);
    std::vector<profuser::EntryBuffers> buffers_of_worker(workers, buffers);
    profuser::over_rows(count, workers, [&](std::size_t worker, std::size_t begin, std::size_t end) {
        for (std::size_t n = begin; n < end; ++n) {
            const profuser::GivenEntries of_row{W, K, given.ids + n * L, given.log_p + n * L, tail ? given.tail + n * W : nullptr};
            const profuser::KeptEntries to_row{kept.ids + n * L,   kept.inside + n * W * L, kept.p + n * W * (L + 1),
                                               kept.log_p + n * W * (L + 1), kept.apart + n * L,  kept.mass + n * W,
                                               kept.present + n * W};
            profuser::keep_entries(of_row, golds[n], rule, to_row, buffers_of_worker[worker]);
        }
    });
}

}  // namespace

PYBIND11_MODULE(_rows, module) {
    module.doc() = "Rows of logits on a CPU: see csrc/rows.h.";
    module.def("exp_rows", &exp_rows, py::arg("rows"), py::arg("maxima"), py::arg("sums"),
               py::arg("spreads"), py::arg("threads"));
    module.def("loss_rows", &loss_rows, py::arg("rows"), py::arg("gold"), py::arg("entries"), py::arg("weight_ce"), py::arg("weight_kd"),
               py::arg("temperature"), py::arg("divergence"), py::arg("beta"), py::arg("conditional"), py::arg("label_smoothing"),
               py::arg("z_loss"), py::arg("entropies"), py::arg("gradient"), py::arg("losses"), py::arg("parts"),
               py::arg("threads"));
    module.def("keep_entries", &keep_entries, py::arg("ids"), py::arg("log_p"), py::arg("tail"), py::arg("labels"), py::arg("bucket"),
               py::arg("absent_tail"), py::arg("tail_floor"), py::arg("entry_floor"), py::arg("vocabulary"), py::arg("to"),
               py::arg("threads"));
}
