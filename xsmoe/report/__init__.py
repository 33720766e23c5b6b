"""Reports of a run's metrics: tables, plots and an HTML page."""
