"""CUDA streams that are reused for the lifetime of the process.

torch hands out streams from a fixed pool in rotation. A new stream in every epoch would eventually be the same as the
capture stream of a graph. It would also keep memory and workspaces allocated for each stream.
"""

import weakref

import torch

POOL = 32
"""Number of streams in torch's pool."""

_streams: dict[tuple[str, torch.device], torch.cuda.Stream] = {}
_leased: dict[torch.device, list[tuple[torch.cuda.Stream, weakref.ref[object]]]] = {}


def stream_for(purpose: str, device: torch.device) -> torch.cuda.Stream:
    """Return the stream for a purpose. No other purpose and no lease on the device uses it."""
    device = _with_index(device)
    if (purpose, device) not in _streams:
        _streams[purpose, device] = _unused_stream(device)
    return _streams[purpose, device]


def lease(owner: object, device: torch.device) -> torch.cuda.Stream:
    """Return a stream that no purpose and no other owner uses while `owner` is alive."""
    device = _with_index(device)
    leased = _leased.setdefault(device, [])
    for place, (stream, of) in enumerate(leased):
        if of() is None:
            leased[place] = stream, weakref.ref(owner)
            return stream
    leased.append((_unused_stream(device), weakref.ref(owner)))
    return leased[-1][0]


def _unused_stream(device: torch.device) -> torch.cuda.Stream:
    used = {stream.cuda_stream for (_, where), stream in _streams.items() if where == device}
    used |= {stream.cuda_stream for stream, _ in _leased.get(device, ())}
    found = torch.cuda.Stream(device)
    for _ in range(POOL):
        if found.cuda_stream not in used:
            break
        found = torch.cuda.Stream(device)
    return found


def _with_index(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
