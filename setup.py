"""The part of lcia that is C; all else is in pyproject.toml."""

from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "src/lcia/ema/compiled.c"
# What the compiler takes for granted of zeros, infinities and the order of sums stays as it is: no -ffast-math.
FLAGS = ["-O3", "-std=c11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

setup(
    ext_modules=[
        Extension(
            "lcia.ema._compiled",  # a shared library that is loaded by ctypes, no module that could be imported
            [SOURCE],
            define_macros=[("SOURCE", f'"{sha256(Path(SOURCE).read_bytes()).hexdigest()}"')],
            extra_compile_args=FLAGS,
            # without a compiler, or with one that refuses, averages are torch's, and `lcia doctor` says so
            optional=True,
        )
    ]
)
