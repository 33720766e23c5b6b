"""The error class of all data readers."""


class DataError(ValueError):
    """Invalid data. The message names the file, the position and a remedy."""
