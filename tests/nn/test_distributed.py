"""Test of the recipe for DistributedDataParallel in docs/modules.md, with two processes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.multiprocessing import spawn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from xsmoe.nn import XSMoE

RANKS, WINDOWS, STEPS, ROWS = 2, 3, 2, 8


def rows_of(window: int, step: int) -> tuple[Tensor, Tensor]:
    """Return hidden states and targets of a step for all ranks. The second rank's rows prefer another expert."""
    generator = torch.Generator().manual_seed(100 * window + step)
    hidden = 0.3 * torch.randn(RANKS * ROWS, 3, 6, generator=generator)
    hidden[:ROWS] += 0.5
    hidden[ROWS:] -= 1.0
    return hidden, torch.randn(RANKS * ROWS, 4, generator=generator)


def train(rank: int | None) -> tuple[dict[str, Tensor], list[int]]:
    """Train and grow over some windows, on the rows of one rank or, as a single process, on all rows.

    Returns:
        The weights and counters after every growth and at the end, and the experts that the first level dropped.
    """
    torch.manual_seed(rank or 0)
    own = slice(None) if rank is None else slice(rank * ROWS, (rank + 1) * ROWS)
    model = XSMoE(("text",), dim=6, rank=3, out_dim=4, num_experts=2)
    with torch.no_grad():
        for _, _, bank in model.banks():
            # Each rank's rows are routed to a different expert.
            bank.router.copy_(torch.tensor([0.0, 2.0, -2.0])[:, None].expand(3, 6))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, eps=1e-4)
    results, dropped = {}, []
    for window in range(WINDOWS):
        trained = model if rank is None else DistributedDataParallel(model, broadcast_buffers=False)
        model.reset_utilization()
        for step in range(STEPS):
            hidden, goal = rows_of(window, step)
            optimizer.zero_grad()
            functional.mse_loss(trained({"text": hidden[own]}), goal[own]).backward()
            optimizer.step()
        if rank is not None:
            for _, _, bank in model.banks():
                distributed.all_reduce(bank.utilization.norm)
                distributed.all_reduce(bank.utilization.gate)
        results |= {f"window {window}, trained: {name}": v.clone() for name, v in model.state_dict().items()}
        pruned = model.prune(0.4, optimizer)
        dropped += [done.expert for done in pruned["text"] if done.level == 0]
        model.expand(optimizer, generator=torch.Generator().manual_seed(window))
        results |= {f"window {window}, grown: {name}": v.clone() for name, v in model.state_dict().items()}
    return results, dropped


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    torch.save(train(rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")
def test_ranks_grow_alike_and_train_as_one_process_does(tmp_path: Path) -> None:
    spawn(process, (str(tmp_path),), RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    alone, dropped = train(None)
    assert dropped[0] == 0, "the first rank alone would have dropped the other expert"
    assert first[1] == second[1] == dropped
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=0)
    torch.testing.assert_close(first[0], alone, rtol=1e-3, atol=1e-4)
