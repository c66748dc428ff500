"""Runs at a guest's end of the network, as a script: ``network_guest.py HOST PORT`` connects again and again and does what
the other end says in one byte: ``s`` sends for as long as somebody reads, ``r`` reads to the end and answers with the
number of bytes (8 bytes, big-endian), anything else ends it.
"""

import contextlib
import socket
import sys

PIECE_BYTES = 256 * 1024


def main() -> None:
    address = sys.argv[1], int(sys.argv[2])
    while True:
        with socket.create_connection(address, timeout=60) as connection:
            order = connection.recv(1)
            if order == b"s":
                piece = bytes(PIECE_BYTES)
                with contextlib.suppress(OSError):
                    while True:
                        connection.sendall(piece)
            elif order == b"r":
                buffer = bytearray(PIECE_BYTES)
                count = 0
                while received := connection.recv_into(buffer):
                    count += received
                connection.sendall(count.to_bytes(8, "big"))
            else:
                return


main()
