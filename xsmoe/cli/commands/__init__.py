"""Implementations of the commands of `xsmoe`. Their options are declared in `xsmoe.cli`."""
