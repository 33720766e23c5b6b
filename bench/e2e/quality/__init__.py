"""Recommendation quality of model and training choices: variants over seeds on one stream."""
