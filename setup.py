"""The C++ extension only; everything else stands in pyproject.toml.

It is optional: without a compiler the install succeeds and alignment runs in Python, which every run's first line says.
"""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "profuser._align",
            ["csrc/bindings.cpp", "csrc/sequence_align.cpp"],
            depends=["csrc/align.h"],
            cxx_std=17,
            optional=True,
        )
    ]
)
