// The Python class profuser._align.ByteAligner. A batch is a dict of CSR arrays, which C++ reads without a copy and with the
// GIL released.

#include "bindings.h"
#include "byte_align.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::vector<T> vector_of(const Array<T>& array) {
    return {array.data(), array.data() + array.size()};
}

void require(bool holds, const std::string& rule) {
    if (!holds) throw std::invalid_argument(rule);
}

// The array `name` of a dict, after a check of its dtype and shape. There is no silent cast, and no read out of bounds. A
// negative number of rows allows any number; columns = -1 asks for one dimension, and any other value for two.
template <typename T>
Array<T> field(const py::dict& batch, const char* name, py::ssize_t rows, py::ssize_t columns = -1) {
    require(batch.contains(name), std::string("a batch needs ") + name);
    const py::object value = batch[name];
    if (!py::isinstance<Array<T>>(value)) {
        const std::string got = py::isinstance<py::array>(value) ? py::str(value.attr("dtype")).cast<std::string>() + " array" +
                                    (value.attr("flags").attr("c_contiguous").cast<bool>() ? "" : " that is not contiguous")
                                                                 : py::str(py::type::of(value)).cast<std::string>();
        throw std::invalid_argument(std::string(name) + " must be a contiguous " + py::str(py::dtype::of<T>()).cast<std::string>() +
                                    " array, got " + got);
    }
    auto array = value.cast<Array<T>>();
    const bool matrix = columns != -1;
    require(array.ndim() == (matrix ? 2 : 1), std::string(name) + " must have " + (matrix ? "2 dimensions" : "1 dimension") + ", got " +
                                                  std::to_string(array.ndim()));
    require(rows < 0 || array.shape(0) == rows, std::string(name) + " must have " + std::to_string(rows) + " rows, got " +
                                                    std::to_string(array.shape(0)));
    return array;
}

// CSR offsets of sequences over `total` rows.
const std::int64_t* offsets_of(const Array<std::int64_t>& offsets, const char* name, py::ssize_t total) {
    const std::int64_t *begin = offsets.data(), *end = begin + offsets.size();
    require(begin[0] == 0 && std::is_sorted(begin, end) && end[-1] == total,
            std::string(name) + " must ascend from 0 to " + std::to_string(total) + ", got " + std::to_string(begin[0]) + ".." +
                std::to_string(end[-1]));
    return begin;
}

// An array that owns the values of a vector, without a copy.
template <typename T>
Array<T> moved(std::vector<T>&& values) {
    auto* const owned = new std::vector<T>(std::move(values));
    return Array<T>(owned->size(), owned->data(), py::capsule(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); }));
}

profuser::Vocabulary vocabulary_of(const py::bytes& bytes, const Array<std::int64_t>& offsets, const Array<std::uint8_t>& text) {
    return {bytes, vector_of(offsets), vector_of(text)};
}

// CppByteAligner.batch_of in profuser/alignment/engine.py makes a batch and shows its fields.
py::dict align(profuser::ByteAligner& aligner, const py::dict& batch, unsigned threads) {
    // Read and check the arrays. B sequences have M rows of the source and R prefix ranges.
    const auto response_offsets = field<std::int64_t>(batch, "response_offsets", -1);
    const py::ssize_t B = response_offsets.size() - 1;
    require(B >= 0, "response_offsets must have one entry more than there are sequences, got none");
    require(batch.contains("response"), "a batch needs response");
    const std::string_view response = batch["response"].cast<std::string_view>();
    const auto target_ids = field<std::int32_t>(batch, "target_ids", -1);
    const auto target_offsets = field<std::int64_t>(batch, "target_offsets", B + 1);
    const auto start = field<std::int64_t>(batch, "start", B);
    const auto target_end = field<std::int32_t>(batch, "target_end", B);
    const auto span_offsets = field<std::int64_t>(batch, "span_offsets", B + 1);
    const auto target_begin = field<std::int32_t>(batch, "target_begin", -1);
    const auto target_stop = field<std::int32_t>(batch, "target_stop", target_begin.size());
    const auto prefix_start = field<std::int32_t>(batch, "prefix_start", target_begin.size() + B);
    const auto source_ids = field<std::int32_t>(batch, "source_ids", -1);
    const py::ssize_t M = source_ids.size();
    const auto source_offsets = field<std::int64_t>(batch, "source_offsets", B + 1);
    const auto source_begin = field<std::int32_t>(batch, "source_begin", M);
    const auto source_stop = field<std::int32_t>(batch, "source_stop", M);
    const auto top_ids = field<std::int32_t>(batch, "top_ids", M, 0);
    const auto top_logprobs = field<float>(batch, "top_logprobs", M, 0);
    const auto own_logprobs = field<float>(batch, "own_logprobs", M);
    const auto range_rows = field<std::int32_t>(batch, "range_rows", -1);
    const py::ssize_t R = range_rows.size();
    const auto range_offsets = field<std::int64_t>(batch, "range_offsets", B + 1);
    const auto range_strip = field<std::int32_t>(batch, "range_strip", R);
    const auto range_logmass = field<float>(batch, "range_logmass", R);
    const auto range_ids = field<std::int32_t>(batch, "range_ids", R, 0);
    const auto range_logprobs = field<float>(batch, "range_logprobs", R, 0);
    require(top_ids.shape(1) == top_logprobs.shape(1), "top_ids and top_logprobs must have one width, got " +
                                                           std::to_string(top_ids.shape(1)) + " and " +
                                                           std::to_string(top_logprobs.shape(1)));
    require(range_ids.shape(1) == range_logprobs.shape(1), "range_ids and range_logprobs must have one width, got " +
                                                               std::to_string(range_ids.shape(1)) + " and " +
                                                               std::to_string(range_logprobs.shape(1)));
    const auto *ro = offsets_of(response_offsets, "response_offsets", response.size()),
               *to = offsets_of(target_offsets, "target_offsets", target_ids.size()),
               *so = offsets_of(span_offsets, "span_offsets", target_begin.size()),
               *mo = offsets_of(source_offsets, "source_offsets", M), *go = offsets_of(range_offsets, "range_offsets", R);
    const std::size_t k = top_ids.shape(1), range_k = range_ids.shape(1);

    // Point every sequence at its parts of the arrays, and count the positions of each.
    std::vector<profuser::Sequence> sequences(B);
    std::vector<profuser::Output> outputs(B);
    Array<std::int64_t> position_offsets(B + 1);
    std::int64_t* const po = position_offsets.mutable_data();
    po[0] = 0;
    for (py::ssize_t b = 0; b < B; ++b) {
        require(start.data()[b] >= 0 && target_end.data()[b] >= -1,
                "start must be >= 0 and target_end >= -1, got " + std::to_string(start.data()[b]) + " and " +
                    std::to_string(target_end.data()[b]));
        profuser::Sequence& q = sequences[b];
        q.response = response.substr(ro[b], ro[b + 1] - ro[b]);
        require(q.response.size() < std::numeric_limits<std::int32_t>::max(), "a response must have less than 2^31 bytes");
        q.target_ids = target_ids.data() + to[b];
        q.target_size = to[b + 1] - to[b];
        q.start = start.data()[b];
        q.target = {target_begin.data() + so[b], target_stop.data() + so[b], static_cast<std::size_t>(so[b + 1] - so[b])};
        q.prefix_start = prefix_start.data() + so[b] + b;
        q.target_end = target_end.data()[b];
        q.source_ids = source_ids.data() + mo[b];
        q.source = {source_begin.data() + mo[b], source_stop.data() + mo[b], static_cast<std::size_t>(mo[b + 1] - mo[b])};
        q.top_ids = top_ids.data() + mo[b] * k;
        q.top_logprobs = top_logprobs.data() + mo[b] * k;
        q.k = k;
        q.own_logprobs = own_logprobs.data() + mo[b];
        q.ranges = go[b + 1] - go[b];
        q.range_rows = range_rows.data() + go[b];
        q.range_strip = range_strip.data() + go[b];
        q.range_logmass = range_logmass.data() + go[b];
        q.range_ids = range_ids.data() + go[b] * range_k;
        q.range_logprobs = range_logprobs.data() + go[b] * range_k;
        q.range_k = range_k;
        po[b + 1] = po[b] + static_cast<std::int64_t>(q.positions());
    }
    // Point every output at its parts of the results. counts becomes entry_offsets, one place further on.
    const std::int64_t total = po[B];
    Array<std::uint8_t> kind(total), skip_reason(total);
    Array<std::int32_t> source_position(total);
    Array<std::int64_t> entry_offsets(total + 1);
    Array<float> tail(total), reliability(total);
    std::int64_t* const counts = entry_offsets.mutable_data() + 1;
    for (py::ssize_t b = 0; b < B; ++b) {
        outputs[b] = {kind.mutable_data() + po[b], source_position.mutable_data() + po[b], counts + po[b],
                      tail.mutable_data() + po[b], reliability.mutable_data() + po[b],  skip_reason.mutable_data() + po[b],
                      {},                           {}};
    }
    // Align, sum the counts up to offsets, and put the entries of all sequences end to end.
    std::vector<std::int32_t> ids;
    std::vector<float> logprobs;
    {
        const py::gil_scoped_release release;
        aligner.align(sequences, outputs, threads);
        counts[-1] = 0;
        for (std::int64_t t = 0; t < total; ++t) counts[t] += counts[t - 1];
        ids.reserve(counts[total - 1]);
        logprobs.reserve(counts[total - 1]);
        for (const profuser::Output& output : outputs) {
            ids.insert(ids.end(), output.ids.begin(), output.ids.end());
            logprobs.insert(logprobs.end(), output.logprobs.begin(), output.logprobs.end());
        }
    }
    using namespace py::literals;
    return py::dict("position_offsets"_a = position_offsets, "kind"_a = kind, "source_position"_a = source_position,
                    "entry_offsets"_a = entry_offsets, "ids"_a = moved(std::move(ids)), "logprobs"_a = moved(std::move(logprobs)),
                    "tail"_a = tail, "reliability"_a = reliability, "skip_reason"_a = skip_reason);
}

void learn(profuser::ByteAligner& aligner, const Array<std::int32_t>& ids, const Array<std::int64_t>& offsets) {
    require(offsets.ndim() == 1 && static_cast<std::size_t>(offsets.size()) == aligner.wanted().size() + 1,
            "offsets must have one entry more than there are texts (" + std::to_string(aligner.wanted().size()) + "), got " +
                std::to_string(offsets.size()));
    aligner.learn(ids.data(), offsets_of(offsets, "offsets", ids.size()));
}

}  // namespace

void bind_byte_aligner(py::module_& module) {
    py::class_<profuser::ByteAligner>(module, "ByteAligner", "Rules 1 to 6 over batches; see profuser.alignment.engine.")
        .def(py::init([](const py::dict& target, const py::dict& source, const py::dict& s) {
                 const auto vocabulary = [](const py::dict& side) {
                     return vocabulary_of(side["bytes"].cast<py::bytes>(), field<std::int64_t>(side, "offsets", -1),
                                          field<std::uint8_t>(side, "text", -1));
                 };
                 profuser::Settings settings;
                 settings.top_k = s["top_k"].cast<std::int32_t>();
                 require(settings.top_k >= 1, "top_k must be >= 1, got " + std::to_string(settings.top_k));
                 settings.min_reliability = s["min_reliability"].cast<float>();
                 settings.same_tokens = s["same_tokens"].cast<bool>();
                 settings.target_end = s["target_end"].cast<std::int32_t>();
                 settings.target_closing = s["target_closing"].cast<std::string>();
                 settings.source_closing = s["source_closing"].cast<std::string>();
                 settings.source_ends = vector_of(field<std::uint8_t>(s, "source_ends", -1));
                 settings.table = vector_of(field<std::int32_t>(s, "table", -1));
                 settings.opens = vector_of(field<std::uint8_t>(s, "opens", -1));
                 settings.closes = vector_of(field<std::uint8_t>(s, "closes", -1));
                 settings.lookahead = vector_of(field<std::uint8_t>(s, "lookahead", -1));
                 settings.merges_digits = s["merges_digits"].cast<bool>();
                 settings.first_number = s["first_number"].cast<std::int32_t>();
                 settings.onward = vector_of(field<std::uint8_t>(s, "onward", -1));
                 settings.exact = vector_of(field<std::int32_t>(s, "exact", -1));
                 return new profuser::ByteAligner(vocabulary(target), vocabulary(source), std::move(settings));
             }),
             py::arg("target"), py::arg("source"), py::arg("settings"))
        .def("align", &align, py::arg("batch"), py::arg("threads"),
             "A batch as a dict of arrays -> the aligned positions as a dict of arrays. Call again after `learn` if texts are wanted.")
        .def("wanted",
             [](const profuser::ByteAligner& aligner) {
                 py::list texts(aligner.wanted().size());
                 for (std::size_t i = 0; i < aligner.wanted().size(); ++i) texts[i] = py::str(aligner.wanted()[i]);
                 return texts;
             },
             "Texts whose first target tokens are not known yet.")
        .def("learn", &learn, py::arg("ids").noconvert(), py::arg("offsets").noconvert(), "The target's ids of the wanted texts (CSR).")
        .def("clear", &profuser::ByteAligner::clear, "Forget what was learnt.")
        .def_property_readonly("cached", &profuser::ByteAligner::cached, "Number of candidates in the cache.");
}
