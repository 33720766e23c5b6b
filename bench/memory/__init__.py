"""How much memory operators and training steps take, as a function of their sizes."""
