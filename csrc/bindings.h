// The parts of the Python module profuser._align. Each takes only arrays of the dtype and layout that C++ reads, and raises
// an error that says what is wrong with any other.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

void bind_byte_aligner(pybind11::module_& module);
