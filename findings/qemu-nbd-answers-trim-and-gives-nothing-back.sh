#!/usr/bin/env bash
# qemu-nbd announces TRIM and answers it with success, and does nothing, unless --discard=unmap.
#
# Seen with qemu-nbd 7.2.22 (Debian 12): its default is --discard=ignore, the export has
# NBD_FLAG_SEND_TRIM all the same, and NBD_CMD_TRIM of 4 MiB of an allocated raw file ends well: the
# file has as many blocks as before, and reads as before. WRITE_ZEROES gives space back with either
# setting. With --discard=unmap the TRIM frees the blocks.
#
# So a guest's `fstrim` reports gigabytes that were never given back, and TRIM promises nothing
# about what is read afterwards.
#
# Exit 0: seen as described. 1: something else was seen. 77: cannot be tried here.
set -euo pipefail
for program in qemu-nbd qemu-io; do
    command -v $program >/dev/null || { echo "needs $program"; exit 77; }
done
work=$(mktemp -d)
end() {
    for pid in "$work"/*.pid; do
        [[ ! -f $pid ]] || kill "$(<"$pid")" || true
    done
    rm -rf "$work"
}
trap end EXIT
qemu-nbd --version | head -1

# Blocks of 512 bytes before and after the TRIM of 4 of 16 MiB, and what is read there.
trimmed() {
    local name=$1
    shift
    head -c 16M /dev/zero | tr '\0' '\252' >"$work/$name"
    sync "$work/$name"
    local before after read=changed
    before=$(stat -c %b "$work/$name")
    qemu-nbd --persistent --fork --format=raw --pid-file="$work/$name.pid" \
        --socket="$work/$name.sock" "$@" "$work/$name"
    local uri="nbd+unix:///?socket=$work/$name.sock"
    qemu-io -d unmap -f raw -c 'discard 0 4M' -c flush "$uri" >"$work/said"
    grep -q '^discard 4194304/4194304' "$work/said" || { cat "$work/said"; exit 1; }
    after=$(stat -c %b "$work/$name")
    [[ $(head -c 4M "$work/$name" | tr -d '\252' | wc -c) == 0 ]] && read=same
    echo "$name: TRIM ok, blocks $before -> $after, data $read"
    result="$((before - after)) $read"
}

trimmed default
default=$result
trimmed unmap --discard=unmap
[[ $default == "0 same" && $result == "8192 changed" ]]
