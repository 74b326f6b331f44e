#!/usr/bin/env bash
# Of two fdatasync calls on one descriptor that run together, one is told that data was lost and the
# other returns 0.
#
# Seen with Linux 6.18.44 and ext4 on a loop device whose file is on a full tmpfs: a block is
# written (into the page cache, which works), two threads call fdatasync on the same descriptor at
# once. Write-back fails. One call fails with ENOSPC, the other returns 0, though it covers the same
# block; a third call returns 0, too. Linux reports a failed write-back once to each open file
# description (errseq_t), not to each caller. With a descriptor of its own (another open, not a dup)
# each thread is told.
#
# So a server that lets two queues flush one descriptor acknowledges data that is gone.
#
# Needs root. Exit 0: seen as described. 1: something else was seen. 77: cannot be tried here.
set -euo pipefail
((EUID == 0)) || { echo "needs root"; exit 77; }
work=$(mktemp -d)
trap 'umount "$work/mnt" 2>/dev/null || true; umount "$work/small" 2>/dev/null || true; rm -rf "$work"' EXIT
echo "kernel $(uname -r), $(python3 --version)"
cat >"$work/try.py" <<'PY'
import os, sys, threading
path, shared = sys.argv[1], sys.argv[2] == "shared"
one = os.open(path, os.O_RDWR)
two = one if shared else os.open(path, os.O_RDWR)
block = b"x" * (4 << 20)
# Into blocks that the file system has, and its device has no room for.
os.pwrite(one, block, 0)
answers, gate = [], threading.Barrier(2)
def sync(fd):
    gate.wait()
    try:
        os.fdatasync(fd)
        answers.append("0")
    except OSError as error:
        answers.append(os.strerror(error.errno))
threads = [threading.Thread(target=sync, args=(fd,)) for fd in (one, two)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
try:
    os.fdatasync(one)
    third = "0"
except OSError as error:
    third = os.strerror(error.errno)
print(f"{'one descriptor' if shared else 'a descriptor each'}: {sorted(answers)}, afterwards {third}")
sys.exit(0 if sorted(answers) == (["0", "No space left on device"] if shared else ["No space left on device"] * 2) and third == "0" else 1)
PY
mkdir "$work/mnt" "$work/small"
for way in shared own; do
    mount -t tmpfs -o size=40M tmpfs "$work/small"
    truncate -s 64M "$work/small/disk"
    # Without a journal, so that only the data's fate is seen.
    mkfs.ext4 -q -O ^has_journal -E nodiscard "$work/small/disk"
    mount -t ext4 -o loop,nodelalloc "$work/small/disk" "$work/mnt" || { echo "this kernel cannot mount ext4"; exit 77; }
    # The file has its blocks; the device behind it has no room for what comes into them.
    fallocate -l 8M "$work/mnt/file"
    sync -f "$work/mnt/file"
    dd if=/dev/zero of="$work/small/filler" bs=1M status=none 2>/dev/null || true
    python3 "$work/try.py" "$work/mnt/file" "$way"
    umount "$work/mnt"
    umount "$work/small"
done
