"""The C++ extension only; everything else stands in pyproject.toml.

It is optional: without a compiler the install succeeds and alignment runs in Python, which every run's first line says.
"""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "profuser._align",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            optional=True,
        )
    ]
)
