// The Python module profuser._align. Numpy arrays go in and out without a copy, and the GIL is released while C++ works.

#include "align.h"
#include "bindings.h"
#include "dtw.h"

#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

// Without py::array::forcecast, an array of another dtype or layout is an error here, and not a silent copy.
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

// The argument `name` as an array of the dtype and layout that C++ reads. Any other argument is an error that names it.
template <typename T>
py::array_t<T, py::array::c_style> vector_of(const py::object& argument, const std::string& name) {
    using Array = py::array_t<T, py::array::c_style>;
    const std::string dtype = py::str(py::dtype::of<T>());
    if (!py::isinstance<Array>(argument)) {
        const std::string got = py::isinstance<py::array>(argument) ? py::str(argument.attr("dtype")) : py::str(py::type::of(argument));
        throw py::type_error(name + " must be a contiguous " + dtype + " array, got " + got + "; np.ascontiguousarray(x, dtype=np." +
                             dtype + ")");
    }
    const auto array = py::reinterpret_borrow<Array>(argument);
    const bool aligned = (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
    if (array.ndim() != 1 || !aligned) {
        throw std::invalid_argument(name + " must be a 1-D, aligned array, got " + std::to_string(array.ndim()) + "-D" +
                                    (aligned ? "" : ", not aligned") + "; make it with code_points()");
    }
    return array;
}

// The strings of two arrays, after a check of every offset and every code point.
profuser::Strings strings_of(const py::array_t<std::uint32_t, py::array::c_style>& codes,
                             const py::array_t<std::int64_t, py::array::c_style>& offsets, const std::string& name) {
    const std::string fix = "; make them with code_points()";
    const std::int64_t* data = offsets.data();
    const py::ssize_t size = offsets.size();
    if (size < 1 || data[0] != 0 || data[size - 1] != codes.size()) {
        throw std::invalid_argument(name + "_offsets must run from 0 to the number of code points, " + std::to_string(codes.size()) +
                                    ", got " + (size < 1 ? "none" : std::to_string(data[0]) + " to " + std::to_string(data[size - 1])) +
                                    fix);
    }
    if (size - 1 > std::numeric_limits<std::int32_t>::max()) {
        throw std::invalid_argument(name + " must have fewer than 2^31 tokens, got " + std::to_string(size - 1) + "; cut the response");
    }
    for (py::ssize_t i = 1; i < size; ++i) {
        if (data[i] < data[i - 1]) {
            throw std::invalid_argument(name + "_offsets must not fall, got " + std::to_string(data[i]) + " after " +
                                        std::to_string(data[i - 1]) + " at " + std::to_string(i) + fix);
        }
    }
    for (py::ssize_t i = 0; i < codes.size(); ++i) {
        if (codes.data()[i] > 0x10FFFF) {
            throw std::invalid_argument(name + "_codes must be code points <= 0x10FFFF, got " + std::to_string(codes.data()[i]) +
                                        " at " + std::to_string(i) + fix);
        }
    }
    return {codes.data(), data, static_cast<std::size_t>(size - 1)};
}

py::tuple dtw(const py::object& source_codes, const py::object& source_offsets, const py::object& target_codes,
              const py::object& target_offsets) {
    const auto source_code_array = vector_of<std::uint32_t>(source_codes, "source_codes");
    const auto source_offset_array = vector_of<std::int64_t>(source_offsets, "source_offsets");
    const auto target_code_array = vector_of<std::uint32_t>(target_codes, "target_codes");
    const auto target_offset_array = vector_of<std::int64_t>(target_offsets, "target_offsets");
    const profuser::Strings source = strings_of(source_code_array, source_offset_array, "source");
    const profuser::Strings target = strings_of(target_code_array, target_offset_array, "target");
    std::vector<std::pair<std::int32_t, std::int32_t>> path;
    {
        py::gil_scoped_release release;
        path = profuser::dtw(source, target);
    }
    Int32Array source_position(static_cast<py::ssize_t>(path.size()));
    Int32Array target_position(static_cast<py::ssize_t>(path.size()));
    std::int32_t* source_data = source_position.mutable_data();
    std::int32_t* target_data = target_position.mutable_data();
    for (const auto& [s, t] : path) {
        *source_data++ = s;
        *target_data++ = t;
    }
    return py::make_tuple(source_position, target_position);
}

}  // namespace

PYBIND11_MODULE(_align, module) {
    module.doc() = "C++ engine of profuser.alignment.";
    module.def("match_spans", &match_spans, py::arg("target_begin").noconvert(), py::arg("target_end").noconvert(),
               py::arg("source_begin").noconvert(), py::arg("source_end").noconvert(),
               "(n,), (n,), (m,), (m,) int32 -> kind (n,) uint8, source_position (n,) int32; see profuser.alignment.spans.");
    module.def("dtw", &dtw, py::arg("source_codes"), py::arg("source_offsets"), py::arg("target_codes"), py::arg("target_offsets"),
               "Code points uint32, offsets int64 -> path's source and target positions, (p,) int32 each; see "
               "profuser.alignment.fusellm.dtw.");
    bind_byte_aligner(module);
}
