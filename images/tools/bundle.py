"""Puts the modules that the guest agent needs into one file, for start.py.

Run on the build machine by the finished interpreter of the tools image: bundle.py TREE, the tools tree with the agent
in it. Importing them all is also the proof that they can be imported. The standard library alone.
"""

import importlib
import marshal
import sys
from pathlib import Path

_GUEST_ROOT = "/opt/shared"
_PYC_HEADER_BYTES = 16


def main() -> None:
    tree = Path(sys.argv[1])
    agent = tree / "agent"
    sys.path.insert(0, str(agent))
    for path in sorted(agent.rglob("*.pyc")):
        name = ".".join(path.relative_to(agent).with_suffix("").parts)
        if name.startswith("atelier."):
            importlib.import_module(name.removesuffix(".__init__"))

    index = {}
    parts = []
    place = 0
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        # The rest is built in, frozen or a shared library.
        if not file.endswith(".pyc") or name == "__main__":
            continue
        code = Path(file).read_bytes()[_PYC_HEADER_BYTES:]
        origin = _GUEST_ROOT + "/" + str(Path(file).relative_to(tree))
        index[name] = (hasattr(module, "__path__"), place, len(code), origin)
        parts.append(code)
        place += len(code)
    head = marshal.dumps(index)
    (agent / "bundle").write_bytes(len(head).to_bytes(8, "little") + head + b"".join(parts))


main()
