"""CUDA streams beside the one that steps run on, for as long as the process lives.

torch gives out a pool of streams in turn. One asked for anew in every epoch would sooner or later be the one on which a
step is captured, and memory and workspaces would be kept for each of them.
"""

import weakref

import torch

POOL = 32
"""Streams that torch gives out, before it begins again with the first."""

_streams: dict[tuple[str, torch.device], torch.cuda.Stream] = {}
_leased: dict[torch.device, list[tuple[torch.cuda.Stream, weakref.ref[object]]]] = {}


def stream_for(purpose: str, device: torch.device) -> torch.cuda.Stream:
    """The stream for a purpose, which no other purpose on the device has, nor any owner of a leased one."""
    device = _numbered(device)
    if (purpose, device) not in _streams:
        _streams[purpose, device] = _another(device)
    return _streams[purpose, device]


def lease(owner: object, device: torch.device) -> torch.cuda.Stream:
    """A stream that no other owner has while this one lives, and no purpose."""
    device = _numbered(device)
    leased = _leased.setdefault(device, [])
    for place, (stream, of) in enumerate(leased):
        if of() is None:
            leased[place] = stream, weakref.ref(owner)
            return stream
    leased.append((_another(device), weakref.ref(owner)))
    return leased[-1][0]


def _another(device: torch.device) -> torch.cuda.Stream:
    taken = {stream.cuda_stream for (_, where), stream in _streams.items() if where == device}
    taken |= {stream.cuda_stream for stream, _ in _leased.get(device, ())}
    found = torch.cuda.Stream(device)
    for _ in range(POOL):
        if found.cuda_stream not in taken:
            break
        found = torch.cuda.Stream(device)
    return found


def _numbered(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
