//! What frontends say that QEMU 7.2 does not, or says otherwise: each message with the wish for a
//! reply, the device's status, rings that are polled or kicked for nothing, sizes that no ring has.
//!
//! Each of it with a supervisor, and where it is offered there without one.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use guest_tests::PATIENCE;
use guest_tests::client::features;
use guest_tests::client::raw::{FREE, GUEST_BASE, RawSession, USER_BASE, WRITE};
use guest_tests::daemon::Daemon;
use rustix::process::Signal;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const SECOND: Duration = Duration::from_secs(1);
const QUEUE_SIZE: u16 = 64;
/// In a message that brings a ring's descriptor: there is none.
const NO_DESCRIPTOR: u64 = 1 << 8;

// Requests, by the numbers of the specification.
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const RESET_OWNER: u32 = 4;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const SET_CONFIG: u32 = 25;
const SET_INFLIGHT_FD: u32 = 32;
const RESET_DEVICE: u32 = 34;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
const SET_STATUS: u32 = 39;
const GET_STATUS: u32 = 40;

fn start(more: &[&str]) -> Daemon {
    Daemon::start(&[&["--domain", "ramdisk", "--param", "size=1M"], more].concat())
}

fn connect(daemon: &Daemon) -> RawSession {
    RawSession::connect(daemon.socket(), features::USUAL).expect("a connection")
}

/// A message with the wish for a reply; the number in that.
fn ask(raw: &RawSession, request: u32, body: &[u8], files: &[RawFd]) -> io::Result<u64> {
    let (flags, body) = raw.ask(request, body, files)?;
    assert_eq!(flags, 5, "request {request}: version 1, a reply");
    Ok(u64::from_le_bytes(body.try_into().expect("one number")))
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// A frontend that wishes for a reply to each message that may carry the wish gets one, once, and
/// the device works with all that was said.
#[test]
fn each_message_that_may_wish_for_a_reply_gets_one() {
    for is_supervised in [true, false] {
        let daemon = start(if is_supervised { &[] } else { &["--no-supervisor"] });
        let mut raw = RawSession::unnegotiated(daemon.socket()).expect("a connection");
        let offered = raw.frontend.get_features().expect("features");
        let protocol = raw.frontend.get_protocol_features().expect("protocol features");
        let [memory, marks] = [(); 2].map(|()| tempfile::tempfile().expect("a file"));
        memory.set_len(1 << 20).expect("its size");
        marks.set_len(8192).expect("its size");
        let kick = EventFd::new(EFD_NONBLOCK).expect("a descriptor");
        let (file, marks, kick) = (memory.as_raw_fd(), marks.as_raw_fd(), kick.as_raw_fd());
        let features =
            offered & (features::USUAL | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits());
        let region = [PLUGGED, 4096, USER_BASE + PLUGGED, 0];
        let inflight = [&numbers(&[8192, 0])[..], &words(&[1 | 128 << 16, 0])].concat();
        let ring = |at: u64| USER_BASE + at;
        let place =
            [&words(&[0, 0])[..], &numbers(&[ring(0), ring(0x2000), ring(0x1000), 0])].concat();
        let table = [&words(&[1, 0])[..], &numbers(&[GUEST_BASE, 1 << 20, USER_BASE, 0])].concat();
        let has = |feature: Protocol| protocol.contains(feature);
        let messages: [(u32, Vec<u8>, &[RawFd], bool); 21] = [
            (SET_PROTOCOL_FEATURES, numbers(&[protocol.bits()]), &[], true),
            (SET_OWNER, vec![], &[], true),
            (SET_FEATURES, numbers(&[features]), &[], true),
            (SET_BACKEND_REQ_FD, vec![], &[kick], has(Protocol::BACKEND_REQ)),
            (SET_STATUS, numbers(&[11]), &[], has(Protocol::STATUS)),
            (SET_VRING_CALL, numbers(&[0]), &[kick], true),
            (SET_VRING_ERR, numbers(&[0]), &[kick], true),
            (SET_INFLIGHT_FD, inflight, &[marks], has(Protocol::INFLIGHT_SHMFD)),
            (SET_MEM_TABLE, table, &[file], true),
            (ADD_MEM_REG, numbers(&[&[0], &region[..]].concat()), &[file], true),
            (SET_VRING_NUM, words(&[0, 64]), &[], true),
            (SET_VRING_BASE, words(&[0, 0]), &[], true),
            (SET_VRING_ADDR, place, &[], true),
            (SET_VRING_KICK, numbers(&[0]), &[kick], true),
            (SET_VRING_ENABLE, words(&[0, 1]), &[], true),
            (SET_CONFIG, [&words(&[32, 1, 0])[..], &[1]].concat(), &[], true),
            (REM_MEM_REG, numbers(&[&[0], &region[..]].concat()), &[], true),
            (SET_VRING_ENABLE, words(&[0, 0]), &[], true),
            (SET_VRING_CALL, numbers(&[NO_DESCRIPTOR]), &[], true),
            (RESET_DEVICE, vec![], &[], true),
            (RESET_OWNER, vec![], &[], true),
        ];
        for (request, body, files, is_offered) in messages {
            let what = format!("request {request}, supervisor: {is_supervised}");
            if is_offered {
                let reply = ask(&raw, request, &body, files);
                assert_eq!(reply.unwrap_or_else(|e| panic!("{what}: {e}")), 0, "{what}");
                // There is no second one in front of the next.
                let queues = ask(&raw, GET_QUEUE_NUM, &[], &[]);
                assert_eq!(queues.unwrap_or_else(|e| panic!("after {what}: {e}")), 1);
            }
        }
        drop(raw);
        RawSession::start(daemon.socket(), features::USUAL, QUEUE_SIZE)
            .expect("a session")
            .assert_one_read();
    }
}

/// Where a region is plugged in.
const PLUGGED: u64 = 1 << 40;

/// A protocol feature that is offered is one whose messages are answered, here or in the test that
/// is named; a device's feature is one that does what it says.
#[test]
fn no_more_is_offered_than_works() {
    let known = [
        (Protocol::MQ, "native::sessions"),
        (Protocol::LOG_SHMFD, "migration"),
        (Protocol::REPLY_ACK, "here"),
        (Protocol::BACKEND_REQ, "native::resize"),
        (Protocol::CONFIG, "native::wire"),
        (Protocol::INFLIGHT_SHMFD, "guest::recovery"),
        (Protocol::RESET_DEVICE, "native::failure_table"),
        (Protocol::CONFIGURE_MEM_SLOTS, "native::failure_table"),
        (Protocol::STATUS, "here"),
        // GET_VRING_BASE_INFLIGHT.
        (Protocol::from_bits_retain(1 << 20), "migration"),
    ];
    let known = known.into_iter().fold(Protocol::empty(), |all, (feature, _)| all | feature);
    for more in [&[][..], &["--no-supervisor"]] {
        let daemon = start(more);
        let mut raw = RawSession::unnegotiated(daemon.socket()).expect("a connection");
        let offered = raw.frontend.get_features().expect("features");
        let protocol = raw.frontend.get_protocol_features().expect("protocol features");
        assert!(known.contains(protocol), "{more:?}: {protocol:?}");
        for (bit, name) in [(38, "NOTIFICATION_DATA"), (40, "RING_RESET")] {
            assert_eq!(offered >> bit & 1, 0, "{name} is offered");
        }
    }
}

/// It survives servers, and 0 is no reset: QEMU says it at each stop of the guest.
#[test]
fn the_status_is_kept_and_resets_nothing() {
    let daemon = start(&[]);
    let mut raw = RawSession::start(daemon.socket(), features::USUAL, QUEUE_SIZE).expect("one");
    let status = |raw: &RawSession| ask(raw, GET_STATUS, &[], &[]).expect("a status");
    assert_eq!(status(&raw), 0);
    assert_eq!(ask(&raw, SET_STATUS, &numbers(&[15]), &[]).expect("a reply"), 0);
    assert_eq!(status(&raw), 15);
    daemon.end_server(Signal::KILL);
    assert_eq!(status(&raw), 15);
    daemon.call(&["upgrade-daemon"]);
    assert_eq!(status(&raw), 15);
    // More bits than there are.
    assert_ne!(ask(&raw, SET_STATUS, &numbers(&[256]), &[]).expect("a reply"), 0);
    assert_eq!(status(&raw), 15);
    raw.assert_one_read();
    assert_eq!(ask(&raw, SET_STATUS, &numbers(&[0]), &[]).expect("a reply"), 0);
    assert_eq!(status(&raw), 0);
    raw.assert_one_read();
    assert_eq!(raw.stop_ring().expect("stopped"), 2, "the next chain to be taken");
    assert_eq!(ask(&raw, SET_STATUS, &numbers(&[15]), &[]).expect("a reply"), 0);
    assert_eq!(ask(&raw, RESET_DEVICE, &[], &[]).expect("a reply"), 0);
    assert_eq!(status(&raw), 0);
}

/// With a supervisor at once; without one the library acknowledges the size, and what says where
/// the ring is is refused.
#[test]
fn a_size_that_no_ring_has_is_answered_with_an_error() {
    for (more, is_supervised) in [(&[][..], true), (&["--no-supervisor"], false)] {
        let daemon = start(&[&["--queue-size", "256"], more].concat());
        for size in [3, 100, 129, 512, 32768] {
            let raw = connect(&daemon);
            raw.share_memory().expect("memory");
            let code = ask(&raw, SET_VRING_NUM, &words(&[0, size]), &[]).expect("a reply");
            let refused =
                code != 0 || !is_supervised && raw.place_ring(0, 0x1_0000, 0x2_0000).is_err();
            assert!(refused, "{size}, supervisor: {is_supervised}");
            assert!(raw.wait_for_end(PATIENCE).expect("a socket"), "{size}: the session goes on");
        }
        RawSession::start(daemon.socket(), features::USUAL, 256)
            .expect("a session")
            .assert_one_read();
    }
}

/// As in a guest with `poll_queues`: there is no call descriptor, or it was taken away.
#[test]
fn a_queue_without_a_call_descriptor_is_served() {
    for more in [&[][..], &["--no-supervisor"]] {
        for is_taken_away in [false, true] {
            let daemon = start(more);
            let mut raw = connect(&daemon);
            raw.share_memory().expect("memory");
            raw.start_polled_ring(QUEUE_SIZE).expect("a ring");
            if is_taken_away {
                raw.renew_call().expect("a call descriptor");
                raw.assert_one_read();
                let gone = ask(&raw, SET_VRING_CALL, &numbers(&[NO_DESCRIPTOR]), &[]);
                assert_eq!(gone.expect("a reply"), 0);
            }
            for _ in 0..100 {
                raw.assert_one_read();
            }
            if more.is_empty() {
                daemon.end_server(Signal::KILL);
                raw.assert_one_read();
            }
            assert!(!daemon.log().contains("not notified"), "{}", daemon.log());
        }
    }
}

/// QEMU 11.1 writes to kick descriptors itself; any frontend may, at any time, and read them.
#[test]
fn kicks_for_nothing_are_legal() {
    for more in [&[][..], &["--no-supervisor"]] {
        let daemon = start(more);
        let mut raw = connect(&daemon);
        let kicks = |raw: &mut RawSession, count: usize| {
            (0..count).for_each(|_| raw.jump(0).expect("a kick"));
        };
        raw.share_memory().expect("memory");
        kicks(&mut raw, 10);
        raw.start_ring(QUEUE_SIZE).expect("a ring");
        for _ in 0..20 {
            kicks(&mut raw, 1000);
            raw.assert_one_read();
            raw.take_kicks();
        }
        assert_eq!(raw.stop_ring().expect("stopped"), 20, "the next chain to be taken");
        kicks(&mut raw, 10);
        raw.start_ring(QUEUE_SIZE).expect("a ring");
        raw.assert_one_read();
        let queue = &daemon.status()["queues"][0];
        assert_eq!((&queue["malformed"], &queue["requests"]), (&0.into(), &21.into()), "{queue}");
        assert_eq!(daemon.status()["connected"], true, "{}", daemon.log());
    }
}

/// Kicks that do not come are not made up for: such a ring would stand still without a word.
#[test]
fn a_ring_without_a_kick_descriptor_is_refused() {
    let daemon = start(&[]);
    let raw = connect(&daemon);
    let reply = ask(&raw, SET_VRING_KICK, &numbers(&[NO_DESCRIPTOR]), &[]);
    assert_ne!(reply.expect("a reply"), 0);
    assert!(daemon.log().contains("no kick descriptor"), "{}", daemon.log());
}

/// One request reads what no descriptor is too large for: OVMF reads whole files so, as the driver
/// of a legacy device.
#[test]
fn a_legacy_driver_reads_14_megabytes_with_one_descriptor() {
    const LEN: usize = 14_090_240;
    let daemon = Daemon::start(&["--domain", "ramdisk", "--param", "size=16M"]);
    // BLK_SIZE, FLUSH, TOPOLOGY.
    let mut raw = RawSession::connect(daemon.socket(), 0x640).expect("a connection");
    raw.share_memory().expect("memory");
    let large = raw.plug_large(0, 16 << 20).expect("more memory");
    raw.start_ring(QUEUE_SIZE).expect("a ring");
    let at = GUEST_BASE + FREE;
    let mut transfer = |kind: u32, direction: u16, used: u32| {
        raw.put(FREE, &[words(&[kind, 0]), numbers(&[3])].concat()).expect("memory");
        raw.put(FREE + 0x1000, &[0xee]).expect("memory");
        let chain = [(at, 16, 0), (large.base, LEN as u32, direction), (at + 0x1000, 1, WRITE)];
        raw.chain(0, &chain).expect("memory");
        raw.offer(0).expect("a kick");
        assert_eq!(raw.used(20 * SECOND).expect("memory"), Some((0, used)));
        assert_eq!(raw.get(FREE + 0x1000, 1).expect("memory"), [0]);
    };
    let bytes: Vec<u8> = (0..LEN / 4).flat_map(|word| (word as u32).to_le_bytes()).collect();
    large.put(&bytes).expect("memory");
    transfer(1, 0, 1);
    large.put(&vec![0; LEN]).expect("memory");
    transfer(0, WRITE, LEN as u32 + 1);
    assert!(large.get(LEN).expect("memory") == bytes, "what was read is not what was written");
}

/// A backend that died without in-flight tracking leaves chains which the driver has reused: their
/// descriptors say anything. The next backend answers what can be, and serves the rest.
#[test]
fn chains_that_another_backend_has_left_are_survived() {
    let daemon = start(&[]);
    let mut raw = connect(&daemon);
    raw.share_memory().expect("memory");
    raw.start_ring_at(QUEUE_SIZE, 385).expect("a ring");
    let at = GUEST_BASE + FREE;
    raw.put(FREE, &[0; 16]).expect("memory");
    for (head, status) in [(8, 0xc6e9_169c_2e7d_a7b6), (16, 0), (24, at + 0x1000)] {
        raw.chain(head, &[(at, 16, 0), (at + 0x2000, 512, WRITE), (status, 1, WRITE)]).unwrap();
        raw.offer(head).expect("a kick");
    }
    let mut answered: Vec<u32> =
        (0..3).map(|_| raw.used(PATIENCE).expect("memory").expect("an answer").0).collect();
    answered.sort_unstable();
    assert_eq!(answered, [8, 16, 24]);
    raw.assert_one_read();
    let queue = &daemon.status()["queues"][0];
    assert_eq!(queue["malformed"], 2, "{queue}");
    assert!(daemon.log().contains("chain 8 is malformed"), "{}", daemon.log());
}

/// The frontend can cut short what it brings, if that cannot be sealed. That ends a server once,
/// and then the session.
#[test]
fn an_in_flight_region_that_is_cut_short_ends_its_session_and_not_the_device() {
    let daemon = start(&[]);
    let region = tempfile::tempfile().expect("a file");
    region.set_len(8192).expect("its size");
    let body = [&numbers(&[8192, 0])[..], &words(&[1 | u32::from(QUEUE_SIZE) << 16, 0])].concat();
    for round in 1..=3 {
        let mut raw = connect(&daemon);
        raw.share_memory().expect("memory");
        let taken = ask(&raw, SET_INFLIGHT_FD, &body, &[region.as_raw_fd()]);
        assert_eq!(taken.expect("a reply"), 0, "round {round}");
        raw.start_ring(QUEUE_SIZE).expect("a ring");
        raw.assert_one_read();
        region.set_len(0).expect("cut short");
        raw.offer(0).expect("a kick");
        assert!(raw.wait_for_end(PATIENCE).expect("a socket"), "{}", daemon.log());
        // And it is refused from then on.
        let raw = connect(&daemon);
        let refused = ask(&raw, SET_INFLIGHT_FD, &body, &[region.as_raw_fd()]);
        assert!(refused.is_err() || refused.is_ok_and(|code| code != 0));
        drop(raw);
        region.set_len(8192).expect("its size");
        RawSession::start(daemon.socket(), features::USUAL, QUEUE_SIZE)
            .expect("a session")
            .assert_one_read();
        assert_eq!(daemon.status()["server"]["deaths"], round, "{}", daemon.log());
    }
    let log = daemon.log();
    assert!(log.contains("in-flight region was cut short"), "{log}");
    assert!(log.contains("in-flight region is refused"), "{log}");
}
