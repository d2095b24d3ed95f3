"""For tools that know nothing of pyproject.toml, where everything is said."""

from setuptools import setup

setup()
