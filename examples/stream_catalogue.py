"""Train on a stream with `StreamingTrainer`, from a generated catalogue: needs `pip install 'xsmoe[train]'`.

The steps are those of the command line: write a dataset, encode the items' texts with a frozen encoder, cut the log
into windows, and train on each window after a test on it.

    python examples/stream_catalogue.py --folder runs/example --windows 6 --users 400
"""

import argparse
import tempfile
from pathlib import Path

import torch

from xsmoe import Recommender, Stream, StreamConfig, StreamingTrainer, UserEncoder, XSMoE
from xsmoe.data import write_catalogue
from xsmoe.encoders import HiddenStateStore, TextEncoder, build_small_text_encoder, encode_items


def run(folder: Path, windows: int, users: int, epochs: int) -> None:
    """Make everything in `folder`, train, and print a line for each window and each test."""
    dataset = write_catalogue(folder / "catalogue", num_windows=windows, users=users, items=160, new_items=20)
    print(f"catalogue: {len(dataset.interactions)} interactions with {len(dataset.items)} items")

    # A small encoder with random weights. Give TextEncoder a Hugging Face name or folder for a real one.
    source = build_small_text_encoder(folder / "encoder", [text for text in dataset.items.texts if text])
    encoder = TextEncoder(source)
    encode_items(dataset.items, dataset.folder, folder / "store", {"text": encoder})
    store = HiddenStateStore.open(folder / "store")

    torch.manual_seed(0)
    items = XSMoE(("text",), dim=encoder.dim, num_levels=len(encoder.levels) - 1, rank=16, out_dim=32)
    model = Recommender(items, UserEncoder(32, num_blocks=1, inner_dim=64))
    stream = Stream.build(dataset.interactions, store, windows)
    config = StreamConfig(epochs=epochs, expand=True, prune=True)
    # A run that was stopped goes on if the same trainer is made on the same folder again.
    with StreamingTrainer(model, stream, config, folder=folder / "run") as trainer:
        for line in trainer.fit():
            if line["kind"] == "test":
                print(f"trained up to window {line['window']}: HR@10 {line['all']['HR@10']:.3f} on the next one")
    print(f"experts of each level: {[bank.num_experts for _, _, bank in model.items.banks()]}")
    print(f"metrics, checkpoints and the model are in {folder / 'run'}")


def main() -> None:
    """Run in the given folder, or in a temporary one."""
    parser = argparse.ArgumentParser(description="Train on a stream from a generated catalogue.")
    parser.add_argument("--folder", type=Path, help="a new folder for everything; default: a temporary one")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--users", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    if options.folder is not None:
        run(options.folder, options.windows, options.users, options.epochs)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), options.windows, options.users, options.epochs)


if __name__ == "__main__":
    main()
