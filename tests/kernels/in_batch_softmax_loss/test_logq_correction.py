"""Subtracting logQ makes the softmax over a sample of the items estimate that over all of them: its sign and its size.

The loss of a query is log(exp(z_t) + sum of the negatives' exp(z)) - z_t. Where each of n negatives is drawn with
probability p_i, and log(n p_i), the expected count, is subtracted from its logit, what is within the logarithm is
exp(z_t) plus a sum whose expectation is that of exp(z_i) over all items. The target's own logit is corrected by log 1:
it is always a candidate.
"""

import pytest
import torch
from torch import Tensor

from tests.kernels.helpers.native_library import needs_library
from xsmoe_kernels import in_batch_softmax_loss, use_backend

NUM_ITEMS, DRAWN, TRIALS = 50, 40, 1000
CORRECTIONS = {"right": 1.0, "none": 0.0, "half": 0.5, "flipped": -1.0}
# Standard errors that an estimate may be off: by chance it is once in two million.
BOUND = 5.0


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_library)])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def make() -> tuple[Tensor, Tensor, Tensor]:
    """Return a query (1, d), items (C + 1, d) with the target last, and the others' probabilities (C,)."""
    generator = torch.Generator().manual_seed(3)
    items = torch.randn(NUM_ITEMS + 1, 8, generator=generator)
    query = 0.5 * torch.randn(1, 8, generator=generator)
    # Some forty times as likely as others, and the likelier the higher they score: a wrong correction cannot average
    # out. Not proportional to exp(z), with which every sample would give the same sum.
    probability = ((query @ items.T)[0, :-1] + torch.linspace(-1, 1, NUM_ITEMS)).softmax(0)
    assert probability.max() > 20 * probability.min()
    return query, items, probability


def estimate(backend: str, size: float) -> tuple[Tensor, Tensor]:
    """Return means (1 + d,) and standard errors of the partition function over exp(z_t) and its gradient."""
    query, items, probability = make()
    generator = torch.Generator().manual_seed(4)
    samples = torch.multinomial(probability.expand(TRIALS, -1), DRAWN, True, generator=generator)
    counts = torch.zeros(TRIALS, NUM_ITEMS + 1).scatter_add_(1, samples, torch.ones(TRIALS, DRAWN))
    logq = torch.cat([size * (DRAWN * probability).log(), torch.zeros(1)])
    target, nothing = torch.tensor([NUM_ITEMS]), torch.empty(1, 0, dtype=torch.int64)
    found = []
    for count in counts:
        leaf = query.clone().requires_grad_()
        with use_backend(backend):
            loss = in_batch_softmax_loss(leaf, items, target, nothing, logq=logq, counts=count)
        # exp(loss) is the partition function over exp(z_t), which is linear in what is drawn; the loss is not.
        ratio = loss.exp()
        (gradient,) = torch.autograd.grad(ratio, leaf)
        found.append(torch.cat([ratio.detach()[None], gradient[0]]))
    trials = torch.stack(found).double()
    return trials.mean(0), trials.std(0) / TRIALS**0.5


def full() -> Tensor:
    """Return the same over all items, in float64 and without the operator."""
    query, items, _ = (tensor.double() for tensor in make())
    query.requires_grad_()
    logits = (query @ items.T)[0]
    ratio = (logits - logits[-1]).exp().sum()
    (gradient,) = torch.autograd.grad(ratio, query)
    return torch.cat([ratio.detach()[None], gradient[0]])


def test_the_sampled_softmax_estimates_the_full_one(backend: str) -> None:
    mean, error = estimate(backend, CORRECTIONS["right"])
    truth = full()
    assert (error < 0.1 * truth.norm()).all(), "the trials say too little"
    assert ((mean - truth).abs() <= BOUND * error).all()


@pytest.mark.parametrize("correction", ["none", "half", "flipped"])
def test_no_other_correction_does(backend: str, correction: str) -> None:
    mean, error = estimate(backend, CORRECTIONS[correction])
    assert (mean - full()).abs()[0] > 3 * BOUND * error[0]
