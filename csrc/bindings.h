// What the parts of the module profuser._align share: arrays that are what C++ reads, or an error that says so.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

void bind_byte_aligner(pybind11::module_& module);
