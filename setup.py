"""Build of the package. The project's metadata lies in pyproject.toml."""

from setuptools import setup

setup()
