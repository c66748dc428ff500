"""Starts the guest agent: ``python -I -S -m atelier.guest_agent``, or ``main()`` from an archive's own start file.

It stands between the boot and the first answer, so it imports nothing before it has kept ``ssl`` away.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the agent until it is ended; returns the exit status. See ``program`` for the options."""
    if "asyncio" not in sys.modules:
        # asyncio takes ssl if it is there. The agent never speaks TLS, and under software emulation the import costs
        # a tenth of a second.
        sys.modules["ssl"] = None  # type: ignore[assignment]
    from atelier.guest_agent.program import run

    return run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
