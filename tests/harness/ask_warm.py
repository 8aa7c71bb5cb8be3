"""`python ask_warm.py SOCKET arguments` stands in for `python arguments`: see `warm.py`. Little is loaded."""

import json
import os
import socket
import sys

if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        request = json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode() + b"\n"  # noqa: PTH109 - pathlib is slow
        socket.send_fds(connection, [request[:1]], [0, 1, 2])
        connection.sendall(request[1:])
        code = connection.recv(1)
    sys.exit(code[0] if code else "the fork was killed")
