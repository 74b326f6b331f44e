#!/usr/bin/env bash
# A Unix SOCK_SEQPACKET socket says ECONNRESET before the packets that it still has; a stream socket
# gives its data first.
#
# Seen with Linux 6.18.44 and Python 3.11: each side of a socketpair sends once, and one side closes
# its end without having read. The other side then receives
#   SOCK_SEQPACKET  ECONNRESET, the packet, the end
#   SOCK_DGRAM      the packet, and then nothing (EAGAIN)
#   SOCK_STREAM     the data, ECONNRESET, the end
# The kernel marks a connected receiver with ECONNRESET when its peer closes with unread data. The
# receive of packets reports a pending error before it looks at the queue, that of a stream after.
#
# So a program that takes ECONNRESET for the end of such a channel loses what a process has said
# last (why it failed, for example), and only if that process had something unread as it ended. To
# receive once more gives it.
#
# Exit 0: seen as described. 1: something else was seen.
set -euo pipefail
echo "kernel $(uname -r), $(python3 --version)"
python3 - <<'PY'
import errno, socket, sys

def receive(ours):
    try:
        return ours.recv(16).decode() or "end"
    except OSError as error:
        return errno.errorcode[error.errno]

def seen(kind):
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    ours.setblocking(False)
    ours.send(b"unread")
    theirs.send(b"last")
    theirs.close()
    return [receive(ours) for _ in range(3)]

expected = {
    "SOCK_SEQPACKET": ["ECONNRESET", "last", "end"],
    "SOCK_DGRAM": ["last", "EAGAIN", "EAGAIN"],
    "SOCK_STREAM": ["last", "ECONNRESET", "end"],
}
found = {name: seen(getattr(socket, name)) for name in expected}
for name, what in found.items():
    print(f"{name}: {', '.join(what)}")
sys.exit(0 if found == expected else 1)
PY
