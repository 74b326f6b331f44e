//! What a daemon leaves in a cluster that it was refused by: with a stand-in for Ceph's libraries.

use guest_tests::ceph::StandIn;

/// Each client that has the image open waits for one that has gone without closing it.
#[test]
fn one_that_is_refused_has_closed_the_image_that_it_had_opened() {
    let cluster = StandIn::new(16);
    cluster.put("rbd.disk.lock", "another");
    cluster.put("rbd.disk.watch.another", "");
    cluster.put("slow", "300");
    let output = cluster.refused(&["image=rbd/disk"]);
    assert_eq!(output.status, 1);
    assert!(output.stderr.contains("another program uses image rbd/disk"), "{}", output.stderr);
    assert_eq!(cluster.watchers(), ["another"]);
}
