"""The part of lcia that is C; all else is in pyproject.toml."""

from setuptools import Extension, setup

# What the compiler takes for granted of zeros, infinities and the order of sums stays as it is: no -ffast-math.
FLAGS = ["-O3", "-std=c11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

# optional: without a compiler, or with one that refuses these flags, averages are torch's, and `lcia doctor` says so
setup(
    ext_modules=[Extension("lcia.ema._compiled", ["src/lcia/ema/compiled.c"], extra_compile_args=FLAGS, optional=True)]
)
