#!/usr/bin/env bash
# After `cp --reflink` of a file on XFS, small O_DIRECT writes to the ORIGINAL go through the page
# cache, without a word.
#
# Seen with Linux 6.18.44, xfsprogs 6.1.0, coreutils 9.1. Before the copy statx says that direct I/O
# may begin at multiples of 512 bytes, and a write of 512 bytes through an O_DIRECT descriptor
# leaves no dirty page. After it statx says 4096; the same write through the same descriptor still
# returns 512, but is now a dirty page in the cache (cachestat): a power cut loses it where a direct
# write to a disk without a volatile cache would have stayed. It remains so when the copy has been
# deleted: XFS treats a file that has shared blocks once like that from then on.
#
# So "O_DIRECT" and "the write returned" say nothing of where the data is, after something as
# ordinary as a backup by reflink. Only fdatasync (or O_DSYNC) does; and a program that asks for the
# alignment once, at open, has an old answer.
#
# Needs root (loop device, mount), XFS, Linux 6.5 (cachestat). Exit 0: seen as described. 1:
# something else. 77: cannot be tried here.
set -euo pipefail
((EUID == 0)) || { echo "needs root"; exit 77; }
if ! command -v mkfs.xfs >/dev/null; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends xfsprogs >/dev/null
fi
work=$(mktemp -d)
trap 'umount "$work/mnt" 2>/dev/null || true; rm -rf "$work"' EXIT
mkdir "$work/mnt"
truncate -s 400M "$work/disk"
mkfs.xfs -q "$work/disk"
mount -t xfs -o loop "$work/disk" "$work/mnt" || { echo "this kernel cannot mount XFS"; exit 77; }
echo "kernel $(uname -r), $(mkfs.xfs -V), $(cp --version | head -n 1)"
head -c 1M /dev/zero >"$work/mnt/original"
cat >"$work/try.py" <<'PY'
import ctypes, mmap, os, subprocess, sys
path = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
def alignment():
    # struct statx: stx_dio_offset_align at 156; STATX_DIOALIGN is 0x2000.
    buffer = ctypes.create_string_buffer(256)
    assert libc.statx(-100, path.encode(), 0, 0x2000, buffer) == 0
    assert int.from_bytes(buffer[0:4], "little") & 0x2000, "this kernel does not say"
    return int.from_bytes(buffer[156:160], "little")
def dirty(fd):
    # cachestat, the same number on all machines: cached, dirty, under write-back, ...
    counts, every = (ctypes.c_uint64 * 5)(), (ctypes.c_uint64 * 2)(0, 0)
    assert libc.syscall(451, fd, every, counts, 0) == 0, "this kernel does not say"
    return counts[1] + counts[2]
memory = mmap.mmap(-1, 4096)
fd = os.open(path, os.O_RDWR | os.O_DIRECT)
def see(when):
    os.fsync(fd)
    wrote = os.pwrite(fd, memoryview(memory)[:512], 512)
    seen = (alignment(), wrote, dirty(fd))
    print(f"{when}: direct I/O at multiples of {seen[0]}; a write of 512 bytes returns {seen[1]}, dirty pages: {seen[2]}")
    return seen
before = see("before")
subprocess.run(["cp", "--reflink=always", path, path + ".copy"], check=True)
after = see("after cp --reflink of it")
os.unlink(path + ".copy")
gone = see("after the copy was deleted")
sys.exit(0 if before == (512, 512, 0) and after == gone == (4096, 512, 1) else 1)
PY
python3 "$work/try.py" "$work/mnt/original"
