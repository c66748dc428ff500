"""Runs inside a guest, as a script: answers on a raw virtio-serial port in the plainest way there is.

This is what Atelier's own path is measured against. Requests are lines: ``ping``, ``spawn``, ``put BYTES PATH`` (the
bytes follow once it has said ``go``), ``get PATH``, ``hash PATH``, ``remove PATH``. Each answer is one line; ``get``'s is followed by the bytes.
"""

import hashlib
import os
import pwd
import sys

PIECE_BYTES = 256 * 1024


def read_line(port: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(port, 4096)
        if not piece:
            raise SystemExit(0)
        line += piece
    return line[:-1]


def write_all(descriptor: int, data: "bytes | memoryview") -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def answer(port: int, line: bytes) -> None:
    verb, _, rest = line.partition(b" ")
    if verb == b"ping":
        write_all(port, b"pong\n")
    elif verb == b"spawn":
        pid = os.posix_spawn("/bin/true", ["/bin/true"], {"PATH": "/usr/bin:/bin"})
        write_all(port, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    elif verb == b"put":
        length, _, path = rest.partition(b" ")
        left = int(length)
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        # Without this a read of the request line could take the first bytes with it.
        write_all(port, b"go\n")
        buffer = memoryview(bytearray(PIECE_BYTES))
        while left:
            # One read gives at most 4 KiB; the file gets them by the quarter megabyte.
            wanted = min(left, PIECE_BYTES)
            filled = 0
            while filled < wanted:
                filled += os.readv(port, [buffer[filled:wanted]])
            write_all(target, buffer[:filled])
            left -= filled
        os.close(target)
        write_all(port, b"done\n")
    elif verb == b"get":
        source = os.open(rest, os.O_RDONLY)
        write_all(port, b"%d\n" % os.fstat(source).st_size)
        while piece := os.read(source, PIECE_BYTES):
            write_all(port, piece)
        os.close(source)
    elif verb == b"hash":
        with open(rest, "rb") as file:
            write_all(port, hashlib.file_digest(file, "sha256").hexdigest().encode() + b"\n")
    elif verb == b"remove":
        os.unlink(rest)
        os.sync()
        write_all(port, b"done\n")
    else:
        write_all(port, b"what?\n")


def main() -> None:
    port = os.open(sys.argv[1], os.O_RDWR)
    user = pwd.getpwnam("user")
    os.initgroups(user.pw_name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    os.chdir(user.pw_dir)
    write_all(port, b"ready\n")
    while True:
        answer(port, read_line(port))


main()
