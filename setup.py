"""Name the packages; everything else that can be declared stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["biper_engine", "biper_engine.*"]),
        "biper_engine.kernels",
    ],
    package_dir={"biper_engine.kernels": "kernels"},
)
