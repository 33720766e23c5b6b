"""Whole training steps: a benchmark for each pooling of the hidden states."""

STEPS = {
    "mean": "bench.e2e.step.training_step:MeanStep",
    "cls": "bench.e2e.step.training_step:ClsStep",
}
