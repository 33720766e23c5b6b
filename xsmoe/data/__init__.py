"""Interaction logs, their items, the windows of a stream, and the sequences within a window."""

from xsmoe.extras import extra

with extra("train"):
    from xsmoe.data.catalogue import write_catalogue
    from xsmoe.data.dataset import Dataset, Items, write_dataset
    from xsmoe.data.errors import DataError
    from xsmoe.data.interactions import Interactions, read_interactions
    from xsmoe.data.movielens import prepare_movielens
    from xsmoe.data.repeats import LogSummary, summarize_log
    from xsmoe.data.sequences import History, Sequences, WindowSplits, item_share, split_window, whole_sequences
    from xsmoe.data.windows import Window, make_windows

__all__ = [
    "DataError",
    "Dataset",
    "History",
    "Interactions",
    "Items",
    "LogSummary",
    "Sequences",
    "Window",
    "WindowSplits",
    "item_share",
    "make_windows",
    "prepare_movielens",
    "read_interactions",
    "split_window",
    "summarize_log",
    "whole_sequences",
    "write_catalogue",
    "write_dataset",
]
