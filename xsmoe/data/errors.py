"""The error that all readers of data raise."""


class DataError(ValueError):
    """Data that cannot be used as it is. The message names the file, the place and what to do about it."""
