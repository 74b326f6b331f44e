#!/usr/bin/env bash
# A process is over while direct I/O that it began by io_uring is not: killed, waited for and gone,
# its write reaches the disk a second later. By Linux AIO (io_submit) the same write is waited for.
#
# Seen with Linux 6.18.44: a write with O_DIRECT to a loop device whose storage stands still (the
# file system under its file is frozen). After SIGKILL the pidfd of the process is ready at once if
# io_uring has the write, and it can be waited for; when the file system is thawed the write lands.
# With io_submit the process does not end before that: exit_aio() waits for what is in flight. The
# end of an io_uring comes later, from a kernel thread.
#
# So "the process that wrote here is dead" does not mean that nothing writes here any more, and that
# an exclusive lock of that process is free does not either.
#
# Needs root, loop devices and fsfreeze. Exit 0: seen as described. 1: something else was seen. 77:
# cannot be tried here.
set -euo pipefail
((EUID == 0)) || { echo "needs root"; exit 77; }
work=$(mktemp -d)
outer= inner=
cleanup() {
    fsfreeze -u "$work/mnt" 2>/dev/null || true
    sleep 0.5
    [[ ! $inner ]] || losetup -d "$inner" || true
    umount "$work/mnt" 2>/dev/null || true
    [[ ! $outer ]] || losetup -d "$outer" || true
    rm -rf "$work"
}
trap cleanup EXIT
echo "kernel $(uname -r)"
mkdir "$work/mnt"
truncate -s 64M "$work/fs"
mkfs.ext4 -q "$work/fs"
outer=$(losetup --show -f "$work/fs") || { echo "no loop device"; exit 77; }
mount "$outer" "$work/mnt" || { echo "no mount"; exit 77; }
dd if=/dev/zero of="$work/mnt/disk" bs=1M count=8 conv=fsync status=none
inner=$(losetup --show -f "$work/mnt/disk")

# Begins one direct write of 4096 letters, says so, and waits.
cat >"$work/writer.py" <<'PY'
import ctypes, mmap, os, signal, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
way, device, letter = sys.argv[1], sys.argv[2], sys.argv[3].encode()
SETUP, ENTER, AIO_SETUP, AIO_SUBMIT = 425, 426, 206, 209
fd = os.open(device, os.O_RDWR | os.O_DIRECT)
memory = mmap.mmap(-1, 4096)
memory.write(letter * 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
if way == "io_uring":
    params = (ctypes.c_uint32 * 30)()
    ring = libc.syscall(SETUP, 4, params)
    if ring < 0:
        sys.exit("no io_uring: " + os.strerror(ctypes.get_errno()))
    # struct io_sqring_offsets begins after 10 numbers: head, tail, mask, entries, flags, dropped,
    # array.
    tail_at, array_at = params[11], params[16]
    queue = mmap.mmap(ring, array_at + 16)
    entries = mmap.mmap(ring, 4 * 64, offset=0x10000000)
    # opcode (23: write), flags, priority, file, offset, address, length
    entries[0:32] = struct.pack("<BBHiQQII", 23, 0, 0, fd, 0, address, 4096, 0)
    queue[array_at:array_at + 4] = struct.pack("<I", 0)
    queue[tail_at:tail_at + 4] = struct.pack("<I", 1)
    done = libc.syscall(ENTER, ring, 1, 0, 0, None, 0)
else:
    context = ctypes.c_ulong(0)
    if libc.syscall(AIO_SETUP, 4, ctypes.byref(context)) < 0:
        sys.exit("no AIO: " + os.strerror(ctypes.get_errno()))
    # data, key, flags, opcode (1: write), priority, file, address, length, offset
    block = ctypes.create_string_buffer(
        struct.pack("<QIiHhIQQqQII", 0, 0, 0, 1, 0, fd, address, 4096, 0, 0, 0, 0))
    list_of = (ctypes.c_void_p * 1)(ctypes.addressof(block))
    done = libc.syscall(AIO_SUBMIT, context, ctypes.c_long(1), list_of)
print("begun" if done == 1 else "not begun", flush=True)
signal.pause()
PY
cat >"$work/kill.py" <<'PY'
import os, select, subprocess, sys, time
way, device, letter, mount = sys.argv[1:]
run = lambda *command: subprocess.run(command, check=True)
run("fsfreeze", "-f", mount)
writer = os.path.join(os.path.dirname(sys.argv[0]), "writer.py")
child = subprocess.Popen([sys.executable, writer, way, device, letter], stdout=subprocess.PIPE, text=True)
begun = child.stdout.readline().strip()
time.sleep(0.3)
pidfd = os.pidfd_open(child.pid)
child.kill()
gone = bool(select.select([pidfd], [], [], 2)[0])
if gone:
    child.wait()
run("fsfreeze", "-u", mount)
child.wait()
deadline = time.time() + 20
landed = False
while not landed and time.time() < deadline:
    with open(device, "rb") as disk:
        landed = disk.read(16) == letter.encode() * 16
    time.sleep(0.1)
print(begun, "gone-first" if gone else "waited", "landed" if landed else "lost")
PY
ring=$(timeout 60 python3 "$work/kill.py" io_uring "$inner" A "$work/mnt")
aio=$(timeout 60 python3 "$work/kill.py" aio "$inner" B "$work/mnt")
echo "io_uring: $ring"
echo "AIO:      $aio"
[[ $ring == "begun gone-first landed" && $aio == "begun waited landed" ]]
