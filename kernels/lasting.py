"""Tables that stay from one call to the next, in memory that no CUDA graph owns.

Source     ours
Differs    while torch.compile warms a CUDA graph up, all that its thread allocates comes from the graph's pool, where nothing may
           stay that is not an output; what is to stay is made in a thread of its own
Exact      yes
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["kept", "lasting"]

P = ParamSpec("P")
R = TypeVar("R")


def lasting(device: torch.device, make: Callable[[], R]) -> R:
    """make(), whose tensors on `device` may outlive the call. Not during a capture or under a tracer, which would not see it."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing() or _get_current_dispatch_mode() is not None:
        return make()
    here = torch.cuda.current_stream(device)
    ready = here.record_event()

    def elsewhere() -> tuple[R, torch.cuda.Event]:
        with torch.cuda.device(device), torch.no_grad():
            there = torch.cuda.current_stream(device)
            there.wait_event(ready)
            return make(), there.record_event()

    with ThreadPoolExecutor(1, "kvsink-tables") as thread:
        made, done = thread.submit(elsewhere).result()
    here.wait_event(done)
    return made


def kept(make: Callable[P, R]) -> Callable[P, R]:
    """A function of tables by hashable arguments, among them a `device`: called once for each combination."""
    signature, made, asked = inspect.signature(make), dict[tuple[Any, ...], R](), dict[tuple[Any, ...], R]()

    @wraps(make)
    def table(*args: P.args, **options: P.kwargs) -> R:
        as_written = (args, *options.items())
        if as_written not in asked:
            asked[as_written] = bound(*args, **options)
        return asked[as_written]

    def bound(*args: P.args, **options: P.kwargs) -> R:
        given = signature.bind(*args, **options).arguments
        key = tuple(given.values())
        if key not in made:
            made[key] = lasting(torch.device(given["device"]), lambda: make(*args, **options))
        return made[key]

    return table
