#!/usr/bin/env bash
# A loop device that was set read-only stays so when it is detached, and the next file that gets its
# number is read-only, too.
#
# Seen with Linux 6.18.44, util-linux 2.38.1: `blockdev --setro /dev/loopN`, `losetup -d
# /dev/loopN`, then another file on the same device, attached for writing: losetup lists it as RO 1,
# though that was not asked for, open(O_RDWR) works, and each write fails with EPERM. The flag of
# BLKROSET belongs to the device node's gendisk, which outlives what was attached. `blockdev
# --setrw` ends it.
#
# So a fresh loop device that takes no writes may be showing another's past; and
# a server that takes permission from open() alone serves it as writable.
#
# Needs root. Exit 0: seen as described. 1: something else was seen. 77: cannot be tried here.
set -euo pipefail
((EUID == 0)) || { echo "needs root"; exit 77; }
work=$(mktemp -d)
device=
trap '[[ ! $device ]] || { blockdev --setrw "$device"; losetup -d "$device" 2>/dev/null || true; }; rm -rf "$work"' EXIT
echo "kernel $(uname -r), $(losetup --version)"
truncate -s 1M "$work/first" "$work/second"
device=$(losetup --show -f "$work/first") || { echo "no loop device"; exit 77; }
blockdev --setro "$device"
losetup -d "$device"
losetup "$device" "$work/second"
listed=$(losetup --noheadings --output RO "$device" | tr -d ' ')
flag=$(blockdev --getro "$device")
wrote=$(python3 - "$device" <<'PY'
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
try:
    os.pwrite(fd, b"x" * 512, 0)
    os.fsync(fd)
    print("worked")
except OSError as error:
    print(os.strerror(error.errno))
PY
)
blockdev --setrw "$device"
echo "another file on the same device: losetup says RO $listed, BLKROGET says $flag, opening for writing works, a write: $wrote"
[[ $listed == 1 && $flag == 1 && $wrote == "Operation not permitted" ]]
