"""Reports of a run: what its metrics say, as tables, plots and one page."""
