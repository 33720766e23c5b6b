"""CUDA streams beside the one that steps run on: one for each purpose and device, for as long as the process lives.

torch gives out a pool of streams in turn. One asked for anew in every epoch would sooner or later be the one on which a
step is captured, and memory and workspaces would be kept for each of them.
"""

import torch

_streams: dict[tuple[str, torch.device], torch.cuda.Stream] = {}


def stream_for(purpose: str, device: torch.device) -> torch.cuda.Stream:
    """The stream for a purpose, which no other purpose on the device has."""
    if (purpose, device) not in _streams:
        taken = {stream.cuda_stream for (_, where), stream in _streams.items() if where == device}
        found = torch.cuda.Stream(device)
        while found.cuda_stream in taken:
            found = torch.cuda.Stream(device)
        _streams[purpose, device] = found
    return _streams[purpose, device]
