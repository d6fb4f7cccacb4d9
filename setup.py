"""Builds the C++ extension; everything else about the package stands in pyproject.toml.

The extension is optional. Without a compiler the installation succeeds and alignment runs in Python; the first line of every
run says which it is.
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
