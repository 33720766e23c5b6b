"""The drifting catalogue: a synthetic dataset with drawn images and captions, for demonstrations and tests."""

from xsmoe.data.catalogue.writer import write_catalogue

__all__ = ["write_catalogue"]
