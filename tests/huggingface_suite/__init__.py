"""transformers' own common model tests, run on this project's models: `make test-hf`.

The tests lie in the source distribution of the installed version, which pip brings to a folder that git
ignores. Nothing of it is copied. What it has no file for (the tests of `generate`, which its tests import) is
replaced by an empty class; tests/lckv/models/test_generation.py is about that.
"""
