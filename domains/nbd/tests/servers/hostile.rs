//! Servers that break the protocol, or connections: no panic, no wrong data, no request answered
//! from half a reply, and the next good server serves.

use domain_api::{Params, Status};
use domain_conformance::{Bench, Job, TestStorage};
use domain_nbd::NbdDisk;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const SIZE: u64 = 1 << 20;
const REPLY: u32 = 0x6744_6698;

/// Greets, and agrees on an export with these flags.
fn greet(stream: &mut UnixStream, flags: u16) -> std::io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    let mut asked = [0; 4 + 16];
    stream.read_exact(&mut asked)?;
    let len = u32::from_be_bytes(asked[16..].try_into().unwrap());
    stream.read_exact(&mut vec![0; len as usize])?;
    let mut says = Vec::new();
    let export = [&0u16.to_be_bytes()[..], &SIZE.to_be_bytes(), &flags.to_be_bytes()].concat();
    for (kind, data) in [(3u32, &export[..]), (1, &[])] {
        says.extend_from_slice(&0x0003_e889_0455_65a9u64.to_be_bytes());
        says.extend_from_slice(&7u32.to_be_bytes());
        says.extend_from_slice(&kind.to_be_bytes());
        says.extend_from_slice(&(data.len() as u32).to_be_bytes());
        says.extend_from_slice(data);
    }
    stream.write_all(&says)
}

/// A request: its kind, its name, its length.
fn request(stream: &mut UnixStream) -> std::io::Result<(u16, u64, u32)> {
    let mut header = [0; 28];
    stream.read_exact(&mut header)?;
    let kind = u16::from_be_bytes([header[6], header[7]]);
    let cookie = u64::from_be_bytes(header[8..16].try_into().unwrap());
    let len = u32::from_be_bytes(header[24..].try_into().unwrap());
    if kind == 1 {
        stream.read_exact(&mut vec![0; len as usize])?;
    }
    Ok((kind, cookie, len))
}

fn reply(cookie: u64, error: u32) -> Vec<u8> {
    [&REPLY.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
}

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
