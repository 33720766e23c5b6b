"""Commands of `python -m bench`."""
