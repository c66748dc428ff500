"""Starts the guest agent inside the guest: ``python3.11 -I -S /opt/shared/agent/start.pyc [OPTION ...]``.

Under software emulation the way from here to the first answer is most of what a new sandbox waits for after its kernel.
So the modules that the agent needs at once come out of one file (made by bundle.py), without searching folders, and the
garbage collector rests meanwhile. Whatever is not in that file is imported from its own, as ever.
"""

import gc

gc.disable()

import marshal  # noqa: E402
import posix  # noqa: E402
import sys  # noqa: E402
from importlib import import_module  # noqa: E402
from importlib.machinery import ModuleSpec  # noqa: E402

_AGENT_FOLDER = "/opt/shared/agent"
_LENGTH_BYTES = 8


class BundleImporter:
    """Finds and loads modules of the bundle. The file: length of the index, index, code; all marshalled."""

    def __init__(self, path):
        self._descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
        length = int.from_bytes(posix.pread(self._descriptor, _LENGTH_BYTES, 0), "little")
        self._code_at = _LENGTH_BYTES + length
        # name -> (is a package, place, length, file that it was made from)
        self._index = marshal.loads(posix.pread(self._descriptor, length, _LENGTH_BYTES))  # noqa: S302

    def find_spec(self, name, path=None, target=None):
        found = self._index.get(name)
        if found is None:
            return None
        is_package, _, _, origin = found
        spec = ModuleSpec(name, self, origin=origin, is_package=is_package)
        spec.has_location = True
        if is_package:
            spec.submodule_search_locations.append(origin.rpartition("/")[0])
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        _, place, length, _ = self._index[module.__name__]
        code = posix.pread(self._descriptor, length, self._code_at + place)
        exec(marshal.loads(code), module.__dict__)  # noqa: S102, S302


def start():
    # Before the finder that searches folders, after those for what is built in.
    sys.meta_path.insert(-1, BundleImporter(f"{_AGENT_FOLDER}/bundle"))
    sys.path.insert(0, _AGENT_FOLDER)
    # main() imports it otherwise, with the collector at work.
    import_module("atelier.guest_agent.program")
    from atelier.guest_agent.__main__ import main

    # What is loaded now stays for good: the collector need not look at it again.
    gc.freeze()
    gc.enable()
    sys.exit(main())


if __name__ == "__main__":
    start()
