"""Builds the C++ extensions; everything else about the package stands in pyproject.toml.

They are optional. Without a compiler the installation succeeds, alignment runs in Python, and the loss on a CPU in plain torch; the
first line of every run says which it is.
"""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

rows = sorted(glob("csrc/rows_*.cpp"))

setup(
    ext_modules=[
        Pybind11Extension(
            "profuser._align",
            sorted(set(glob("csrc/*.cpp")) - set(rows)),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            optional=True,
        ),
        Pybind11Extension(
            "profuser._rows",
            rows,
            depends=["csrc/rows.h", "csrc/threads.h"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wno-psabi"],
            optional=True,
        ),
    ]
)
