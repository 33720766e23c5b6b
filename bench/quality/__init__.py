"""What each choice of model and training is worth: variants over seeds on one stream."""
