#!/usr/bin/env bash
# Who connects to an nbdkit that went into the background is told of a process that has ended.
#
# Seen with nbdkit 1.32.5 (Debian 12), Linux 6.18: nbdkit listens on its Unix socket before it forks
# into the background, which is its default. The kernel notes who called listen(), and SO_PEERCRED
# gives that: the parent, which is gone, while the server lives under another number. With
# --foreground, and with qemu-nbd --fork, which forks before it listens, it is the server's.
#
# So a client that asks whether "the server behind this socket" lives, to know whether a write of a
# broken connection can still land, is told "no" by a server that is about to carry it out. And once
# the number is used again it is told of a stranger.
#
# Exit 0: seen as described. 1: something else was seen. 77: cannot be tried here.
set -euo pipefail
for program in nbdkit qemu-nbd python3; do
    command -v $program >/dev/null || { echo "needs $program"; exit 77; }
done
work=$(mktemp -d)
end() {
    for pid in "$work"/*.pid; do
        [[ ! -f $pid ]] || kill "$(<"$pid")" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap end EXIT
nbdkit --version
qemu-nbd --version | head -1
truncate -s 1M "$work/image"

# Whether the peer of a socket is the process of the file, and whether there is such a process.
peer() {
    for _ in {1..500}; do
        [[ ! -S $work/$1.sock || ! -s $work/$1.pid ]] || break
        sleep 0.01
    done
    python3 - "$work/$1.sock" "$work/$1.pid" <<'END'
import os, socket, struct, sys
with socket.socket(socket.AF_UNIX) as client:
    client.connect(sys.argv[1])
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    greeting = client.recv(8)
peer, server = struct.unpack("3i", credentials)[0], int(open(sys.argv[2]).read())
assert greeting == b"NBDMAGIC" and os.path.exists(f"/proc/{server}")
print("the server" if peer == server else
      "another process" if os.path.exists(f"/proc/{peer}") else "a process that has ended")
END
}

nbdkit --unix "$work/background.sock" --pidfile "$work/background.pid" file "$work/image"
nbdkit --foreground --unix "$work/foreground.sock" --pidfile "$work/foreground.pid" \
    file "$work/image" &
qemu-nbd --persistent --fork --format=raw --pid-file="$work/qemu.pid" --socket="$work/qemu.sock" \
    "$work/image"
for name in background foreground qemu; do
    seen=$(peer $name)
    echo "$name: $seen"
    printf -v "$name" %s "$seen"
done
[[ $background == "a process that has ended" && $foreground == "the server" && $qemu == "the server" ]]
