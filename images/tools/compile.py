"""Compiles a source folder to .pyc files that stand where their sources stood.

Run on the build machine by the tools image's own interpreter, whose bytecode it must be:
compile.py SOURCE DESTINATION PATH-IN-THE-GUEST. The standard library alone.
"""

import importlib.util
import marshal
import sys
from pathlib import Path

_UNCHECKED_HASH_FLAGS = 0b01
# Without docstrings and asserts there is a third less to read at each start.
_OPTIMIZE = 2


def main() -> None:
    source, destination, guest = (Path(argument) for argument in sys.argv[1:4])
    for path in sorted(source.rglob("*.py")):
        relative = path.relative_to(source)
        code = compile(path.read_bytes(), str(guest / relative), "exec", dont_inherit=True, optimize=_OPTIMIZE)
        # Unchecked: the interpreter never looks for the source, and no time stamp gets into the file.
        header = importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH_FLAGS.to_bytes(4, "little") + bytes(8)
        target = (destination / relative).with_suffix(".pyc")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(header + marshal.dumps(code))


main()
