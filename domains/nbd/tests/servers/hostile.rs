//! Servers that break the protocol, or connections: no panic, no wrong data, no request answered
//! from half a reply, and the next good server serves.

use crate::common::scripted::{greet, reply, request};
use domain_api::{Params, Status};
use domain_conformance::{Bench, Job, TestStorage};
use domain_nbd::NbdDisk;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Answers as it should, with bytes of 7.
fn serve_well(stream: &mut UnixStream, flags: u16) {
    if greet(stream, flags).is_err() {
        return;
    }
    while let Ok((kind, cookie, len)) = request(stream) {
        let mut says = reply(cookie, 0);
        if kind == 0 {
            says.resize(16 + len as usize, 7);
        }
        if stream.write_all(&says).is_err() {
            return;
        }
    }
}

/// A server that serves its first connection well, as many as `bad` says as `badly` does, and the
/// others well.
struct Hostile {
    folder: tempfile::TempDir,
    connections: Arc<AtomicUsize>,
}

impl Hostile {
    fn new(bad: usize, badly: Serve) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let number = count.fetch_add(1, Ordering::Relaxed);
                if number < bad { badly(&mut stream) } else { serve_well(&mut stream, 5) }
            }
        });
        Self { folder, connections }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn params(&self) -> Params {
        let uri = format!("uri=nbd+unix:///?socket={}", self.socket().display());
        Params::from_pairs([uri.as_str(), "connections=1", "settle=0"]).unwrap()
    }
}

/// What a read of 8 KiB comes to, after so many connections that went badly.
fn read_after(bad: usize, badly: Serve) -> (Status, Vec<u8>, usize) {
    let server = Hostile::new(bad, badly);
    let storage = TestStorage::new();
    let bench = Bench::activated::<NbdDisk>(&storage, &server.params()).unwrap();
    let mut lane = bench.lane(0).unwrap();
    let done = lane.one(Job::read(4096, 8192)).unwrap();
    let status = done.status;
    let data = if status == Status::Ok { done.ok().unwrap() } else { Vec::new() };
    drop(lane);
    bench.retire().unwrap();
    (status, data, server.connections.load(Ordering::Relaxed))
}

/// How a server serves a connection.
type Serve = fn(&mut UnixStream);

const BADLY: &[(&str, Serve)] = &[
    ("another magic", |stream| {
        let _ = greet(stream, 5);
        let _ = request(stream);
        let _ = stream.write_all(&[0x66; 64]);
    }),
    ("a structured reply", |stream| {
        let _ = greet(stream, 5);
        let _ = request(stream);
        let _ = stream.write_all(&[&0x668e_33efu32.to_be_bytes()[..], &[0; 60]].concat());
    }),
    ("another's name", |stream| {
        let _ = greet(stream, 5);
        if let Ok((_, cookie, _)) = request(stream) {
            let _ = stream.write_all(&reply(cookie ^ 1 << 40, 0));
        }
    }),
    ("half a header", |stream| {
        let _ = greet(stream, 5);
        if let Ok((_, cookie, _)) = request(stream) {
            let _ = stream.write_all(&reply(cookie, 0)[..9]);
        }
    }),
    ("half the data", |stream| {
        let _ = greet(stream, 5);
        if let Ok((_, cookie, len)) = request(stream) {
            let mut says = reply(cookie, 0);
            says.resize(16 + len as usize / 2, 9);
            let _ = stream.write_all(&says);
        }
    }),
    ("too much", |stream| {
        let _ = greet(stream, 5);
        if let Ok((_, cookie, len)) = request(stream) {
            let mut says = reply(cookie, 0);
            says.resize(16 + len as usize - 1, 9);
            says.extend_from_slice(&reply(cookie, 0));
            says.truncate(16 + len as usize - 1);
            let _ = stream.write_all(&says);
        }
    }),
    ("going down", |stream| {
        let _ = greet(stream, 5);
        if let Ok((_, cookie, _)) = request(stream) {
            let _ = stream.write_all(&reply(cookie, 108));
            let _ = stream.read(&mut [0]);
        }
    }),
];

#[test]
fn a_request_that_was_answered_badly_is_sent_again_and_answered_once() {
    for (name, badly) in BADLY {
        for bad in [1, 3] {
            let (status, data, connections) = read_after(bad, *badly);
            assert_eq!((status, data), (Status::Ok, vec![7; 8192]), "{name}, {bad} times");
            assert!(connections > bad, "{name}: {connections} connections");
        }
    }
}

#[test]
fn a_server_that_never_answers_well_costs_an_error_and_no_more() {
    for (name, badly) in &BADLY[..6] {
        let (status, _, connections) = read_after(5, *badly);
        assert_eq!(status, Status::IoError, "{name}");
        assert!(connections >= 5, "{name}: {connections} connections");
    }
}

/// Bytes that come one by one, with a pause now and then.
#[test]
fn slow_bytes_are_read_all_the_same() {
    let (status, data, connections) = read_after(1, |stream| {
        let _ = greet(stream, 5);
        if let Ok((_, cookie, len)) = request(stream) {
            let mut says = reply(cookie, 0);
            says.resize(16 + len as usize, 8);
            for (at, byte) in says.iter().enumerate() {
                if at % 1024 == 7 {
                    std::thread::sleep(std::time::Duration::from_millis(3));
                }
                let _ = stream.write_all(&[*byte]);
            }
            let _ = stream.read(&mut [0]);
        }
    });
    assert_eq!((status, data, connections), (Status::Ok, vec![8; 8192], 1));
}

#[test]
fn an_export_that_changes_between_connections_is_not_used() {
    let server = Hostile::new(2, |stream| {
        static SEEN: AtomicUsize = AtomicUsize::new(0);
        if SEEN.fetch_add(1, Ordering::Relaxed) == 0 {
            let _ = greet(stream, 5);
            let _ = request(stream);
        } else {
            // Read-only.
            serve_well(stream, 7);
        }
    });
    let bench = Bench::activated::<NbdDisk>(&TestStorage::new(), &server.params()).unwrap();
    let mut lane = bench.lane(0).unwrap();
    assert_eq!(lane.one(Job::write(0, vec![1; 512])).unwrap().status, Status::Ok);
    assert!(server.connections.load(Ordering::Relaxed) >= 3);
    let lines = bench.host.lines();
    assert!(lines.iter().any(|(_, line)| line.contains("cannot be written any more")), "{lines:?}");
    drop(lane);
    bench.retire().unwrap();
}
