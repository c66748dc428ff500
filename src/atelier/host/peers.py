"""Whether the program at the other end of a socket is still there.

Called by the programs that serve the manager and outlive it: what a manager has asked for that is dead by now must not be
done any more, since its successor may have asked for the opposite already.
"""

from __future__ import annotations

import select


def has_gone(descriptor: int) -> bool:
    """Whether the other end of this connected unix socket is closed, as it is when its process is dead. One that has
    only said that it sends no more is there still. Source: poll(2): POLLHUP is told unasked."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))
