"""Memory of operators and training steps as a function of their sizes."""
