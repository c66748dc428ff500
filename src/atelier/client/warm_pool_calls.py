"""The routes of warm pools: what is sent, and how the answer is read. Without I/O; ``warm_pools.py`` gives them to people."""

from __future__ import annotations

from atelier.client.addresses import encode_segment
from atelier.client.call import (
    ANSWER_TIMEOUT_SECONDS,
    API,
    WAIT_AT_MOST_SECONDS,
    Call,
    make_patch,
    read_model,
    read_nothing,
)
from atelier.schemas.warm_pools import SetWarmPoolRequest, WarmPool, WarmPoolList

_TIMEOUT_SECONDS = WAIT_AT_MOST_SECONDS + ANSWER_TIMEOUT_SECONDS
"""What is too much is destroyed before the answer comes."""


def list_warm_pools() -> Call[WarmPoolList]:
    operation = "list the warm pools"
    return Call(operation, "GET", f"{API}/warm-pools", read_model(WarmPoolList, operation), repeatable=True)


def set_warm_pool(image: str, *, size: int, vcpu_count: int | None, memory_mib: int | None) -> Call[WarmPool]:
    operation = f"set the warm pool of {image}"
    asked = {"size": size, "vcpu_count": vcpu_count, "memory_mib": memory_mib}
    body = make_patch(
        SetWarmPoolRequest, operation, **{key: value for key, value in asked.items() if value is not None}
    )
    return Call(
        operation,
        "PUT",
        _path(image),
        read_model(WarmPool, operation),
        body,
        read_timeout_seconds=_TIMEOUT_SECONDS,
        repeatable=True,
    )


def drain_warm_pools(image: str) -> Call[None]:
    operation = f"drain the warm pools of {image}"
    return Call(operation, "DELETE", _path(image), read_nothing, read_timeout_seconds=_TIMEOUT_SECONDS)


def _path(image: str) -> str:
    return f"{API}/warm-pools/{encode_segment(image, 'image')}"
