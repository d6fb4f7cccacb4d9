// Module profuser._align: numpy arrays in and out without a copy, the GIL released while C++ works.

#include "align.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

// No forcecast: an array of another dtype or layout is an error here and not a silent copy.
using Int32Array = py::array_t<std::int32_t, py::array::c_style>;

profuser::Spans spans_of(const Int32Array& begin, const Int32Array& end, const std::string& name) {
    if (begin.ndim() != 1 || end.ndim() != 1 || begin.size() != end.size()) {
        throw std::invalid_argument(name + "_begin and " + name + "_end must be 1-D of one length, got " +
                                    std::to_string(begin.size()) + " and " + std::to_string(end.size()));
    }
    return {begin.data(), end.data(), static_cast<std::size_t>(begin.size())};
}

void require_ordered(profuser::Spans spans, const std::string& name) {
    const std::size_t i = profuser::first_unordered_span(spans);
    if (i < spans.size) {
        throw std::invalid_argument(name + " spans must be monotone with begin <= end, got [" + std::to_string(spans.begin[i]) + ", " +
                                    std::to_string(spans.end[i]) + ") at " + std::to_string(i) + "; re-encode the response");
    }
}

py::tuple match_spans(const Int32Array& target_begin, const Int32Array& target_end, const Int32Array& source_begin,
                      const Int32Array& source_end) {
    const profuser::Spans target = spans_of(target_begin, target_end, "target");
    const profuser::Spans source = spans_of(source_begin, source_end, "source");
    py::array_t<std::uint8_t> kind(target_begin.size());
    Int32Array source_position(target_begin.size());
    std::uint8_t* kind_data = kind.mutable_data();
    std::int32_t* position_data = source_position.mutable_data();
    {
        py::gil_scoped_release release;
        require_ordered(target, "target");
        require_ordered(source, "source");
        profuser::match_spans(target, source, kind_data, position_data);
    }
    return py::make_tuple(kind, source_position);
}

}  // namespace

PYBIND11_MODULE(_align, module) {
    module.doc() = "C++ engine of profuser.align.";
    module.def("match_spans", &match_spans, py::arg("target_begin").noconvert(), py::arg("target_end").noconvert(),
               py::arg("source_begin").noconvert(), py::arg("source_end").noconvert(),
               "(n,), (n,), (m,), (m,) int32 -> kind (n,) uint8, source_position (n,) int32; see profuser.align.match_spans.");
}
