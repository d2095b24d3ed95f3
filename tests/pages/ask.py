"""Runs `python ARGUMENT ...` as a fork of the warm Python, and ends as the fork does.

    python ask.py SOCKET PYTHON [ARGUMENT ...]

Loads nothing but what it needs. What the warm Python cannot be (`python -c`) is left to PYTHON.
"""

import json
import os
import signal
import socket
import sys

path, python, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
if not arguments or (arguments[0] not in ("-m", "-u") and arguments[0].startswith("-")):
    os.execv(python, [python, *arguments])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(path)
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(connection, [b"x"], [0, 1, 2])
    connection.sendall(json.dumps(request).encode() + b"\n")
    with connection.makefile() as answers:
        fork = int(answers.readline())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: os.kill(fork, number))
        status = answers.readline()
sys.exit(int(status) if status else 1)
