//! Everything end to end without a guest: what is shipped, under a native client.
//!
//! One program for all, because a program of tests costs as much to build as what is in it. The
//! daemons are processes of their own, and what is counted is theirs, seen from outside:
//! descriptors, threads, memory and mappings. So tests may run side by side here. One that changes
//! or counts something of its own process is a program of its own, whose file stands beside this
//! directory and begins with `native_`: `scripts/test` runs those, too.

mod canary;
mod ceph;
mod ceph_failures;
mod ceph_page;
mod check;
mod dirty_log;
mod durability;
mod ending;
mod failure_table;
mod failures;
mod fleet_page;
mod history;
mod host;
mod inflight_migration;
mod leaks;
mod limits;
mod locking;
mod log;
mod metrics;
mod nbd;
mod nbd_failures;
mod nbd_page;
mod nbd_servers;
mod peer;
mod protocol;
mod rbd;
mod rbd_refused;
mod refusals;
mod residents;
mod resize;
mod sandbox;
mod second;
mod server;
mod sessions;
mod signed;
mod stalled_storage;
mod starved;
mod storage;
mod supervisor;
mod takeover;
mod top;
mod upgrade_daemon;
mod upgrades;
mod wire;
mod write_cache;
