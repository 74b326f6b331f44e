#!/usr/bin/env bash
# What `rbd config image set` has put into an image goes before what its client sets itself with
# rados_conf_set, and the client is not told: a write is acknowledged before any OSD has it.
#
# Seen with librbd 16.2.15 (Debian 12): a client sets rbd_cache=false and connects. With
# rbd_cache=true and rbd_cache_policy=writeback in the image (or in its pool, `rbd config pool
# set`), a write after the first flush is acknowledged after 0.1 ms, and gone when the client is
# killed; without, it takes a millisecond or more and stays. With the default policy, writearound,
# it is gone if the kill comes soon. rados_conf_get still says "false", rbd_config_image_list says
# "true".
#
# So a client that relies on its own setting has to ask for the image's after it has opened it.
#
# Needs a cluster with a pool `rbd` that CEPH_CONF leads to (`scripts/try-ceph --folder DIR
# --set-up` starts one: CEPH_CONF=DIR/ceph.conf), and Debian's python3-rbd.
#
# Exit 0: seen as described. 1: something else was seen. 77: cannot be tried here.
set -euo pipefail
python=/usr/bin/python3
$python -c 'import rados, rbd' 2>/dev/null || { echo "needs python3-rbd"; exit 77; }
[[ ${CEPH_CONF-} ]] && timeout 20 rbd ls rbd >/dev/null 2>&1 || { echo "needs a cluster"; exit 77; }
image=finding-$$
trap 'rm -f "$client"; rbd rm --no-progress "rbd/$image" >/dev/null 2>&1 || true' EXIT
client=$(mktemp)
rbd --version
cat >"$client" <<'PYTHON'
import os, rados, rbd, sys, time
cluster = rados.Rados(conffile=os.environ["CEPH_CONF"])
cluster.conf_set("rbd_cache", "false")
cluster.connect()
image = rbd.Image(cluster.open_ioctx("rbd"), sys.argv[1])
image.write(b"." * 4096, 0)
image.flush()
began = time.time()
image.write(sys.argv[2].encode() * 4096, 0)
took = (time.time() - began) * 1000
says = {o["name"]: o["value"] for o in image.config_list()}["rbd_cache"]
print(f"acknowledged after {took:.1f} ms; rbd_cache: the client's", cluster.conf_get("rbd_cache"),
      "the image's", says, flush=True)
os.kill(os.getpid(), 9)
PYTHON

# The first byte of the image after a client that has written `$1` there is killed.
left_by() {
    $python "$client" "$image" "$1" || true
    left=$(rbd export --no-progress "rbd/$image" - 2>/dev/null | head -c 1 || true)
    echo "wrote $1, left $left"
}

rbd create "rbd/$image" --size 4M
left_by a
without=$left
rbd config image set "rbd/$image" rbd_cache true
rbd config image set "rbd/$image" rbd_cache_policy writeback
left_by b
[[ $without == a && $left == . ]]
