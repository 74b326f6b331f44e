//! The measuring device, measured: the client and its load against `qemu-storage-daemon`.
//!
//! An independent backend must come out clean, and damage done on purpose must be found. Without
//! this, a fault in the client would look like one in the daemon, and a blind check like a good
//! daemon. Where the peer is not installed there is nothing to measure against, and these tests say
//! so and pass.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::client::{Client, Options, Request, Status, features};
use guest_tests::stamp::{BLOCK, Ledger, Load, LoadOptions, assert_intact, damage, run_load};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const DISK_BYTES: u64 = 64 << 20;
const SECOND: Duration = Duration::from_secs(1);

/// `qemu-storage-daemon` with a raw image of zeros.
struct Peer {
    child: Child,
    image: PathBuf,
    socket: PathBuf,
    _directory: TempDir,
}

impl Peer {
    fn start() -> Option<Peer> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (image, socket) =
            (directory.path().join("disk.img"), directory.path().join("peer.sock"));
        File::create(&image).and_then(|file| file.set_len(DISK_BYTES)).expect("an image");
        let child = serve(&image, &socket)?;
        Some(Peer { child, image, socket, _directory: directory })
    }

    /// Goes on with a load. The peer does not bear every connection that comes right after an
    /// abandoned one: it resets it, or dies of it, and is started again.
    fn resume(&mut self, options: &LoadOptions, ledgers: Vec<Ledger>) -> Load {
        for _ in 0..100 {
            match Client::connect(&self.socket, &options.client) {
                Ok(client) => return Load::resume_with(client, options, ledgers),
                Err(error) => println!("tried again: the peer: {error}"),
            }
            thread::sleep(Duration::from_millis(100));
            if let Some(status) = self.child.try_wait().expect("its state") {
                println!("started again: the peer: {status}");
                self.child = serve(&self.image, &self.socket).expect("it was there before");
            }
        }
        panic!("the peer cannot be connected to");
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the peer lives");
    }
}

/// The peer, once it listens; nothing if it is not installed.
fn serve(image: &Path, socket: &Path) -> Option<Child> {
    let child = Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!("driver=file,filename={},node-name=disk,discard=unmap", image.display()))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,\
             addr.type=unix,addr.path={}",
            socket.display()
        ))
        .spawn();
    let Ok(child) = child else {
        println!("skipped: qemu-storage-daemon is not installed");
        return None;
    };
    // The file is there before it can be connected to, and to try would be a session.
    for _ in 0..3000 {
        if listens(socket) {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    Some(child)
}

/// Whether a process listens on the socket at `path`, by the kernel's table: a line of it has the
/// flags as its fourth column, `SO_ACCEPTCON` is 0x10000, and the path is the last.
fn listens(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/net/unix").expect("the kernel's table");
    table.lines().any(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        columns.last().is_some_and(|last| Path::new(last) == path)
            && columns.get(3).is_some_and(|&flags| flags == "00010000")
    })
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_independent_device_comes_out_clean() {
    let Some(peer) = Peer::start() else { return };
    for bits in [features::USUAL, features::WITHOUT_EVENT_IDX, features::VERSION_1 | features::MQ] {
        let mut options = LoadOptions::new(2, 32);
        options.client.features = bits;
        // The image is not zeros any more, so the second and third load must find what they leave.
        fs::File::options()
            .write(true)
            .open(&peer.image)
            .and_then(|f| f.set_len(0))
            .expect("emptied");
        fs::File::options()
            .write(true)
            .open(&peer.image)
            .and_then(|f| f.set_len(DISK_BYTES))
            .expect("grown");
        let report = run_load(&peer.socket, &options, SECOND);
        report.assert_clean();
        assert!(report.ios > 1000, "too slow to mean anything: {report:?}");
        assert_intact(&peer.socket, &report.ledgers);
    }
}

#[test]
fn requests_and_refusals_come_back_as_what_they_are() {
    let Some(peer) = Peer::start() else { return };
    let mut client = Client::connect(&peer.socket, &Options::default()).expect("a connection");
    assert_eq!((client.capacity(), client.max_queues()), (DISK_BYTES, 2));
    let data = vec![0x5a; 3 * BLOCK];
    let queue = client.queue(0);
    let mut ask = |request| queue.execute(request, PATIENCE).expect("an answer");
    assert_eq!(ask(Request::Write { offset: 512, data: &data }), (Status::Ok, vec![]));
    assert_eq!(ask(Request::Read { offset: 512, len: data.len() }), (Status::Ok, data.clone()));
    let zeroes = Request::WriteZeroes { offset: 1024, len: 1024, unmap: false };
    assert_eq!(ask(zeroes), (Status::Ok, vec![]));
    let expected = [vec![0x5a; 512], vec![0; 1024], vec![0x5a; 512]].concat();
    assert_eq!(ask(Request::Read { offset: 512, len: 2048 }), (Status::Ok, expected));
    assert_eq!(ask(Request::Flush).0, Status::Ok);
    assert_eq!(ask(Request::Identify).0, Status::Ok);
    assert_eq!(ask(Request::Read { offset: DISK_BYTES, len: 512 }).0, Status::IoError);
}

#[test]
fn one_changed_byte_and_one_lost_write_are_found() {
    let Some(mut peer) = Peer::start() else { return };
    let options = LoadOptions::new(1, 16);
    let first = run_load(&peer.socket, &options, SECOND / 2);
    first.assert_clean();
    let image = File::options().read(true).write(true).open(&peer.image).expect("the image");
    let before = fs::read(&peer.image).expect("the image");

    // Not every block is stamped: a load may discard. Some stamped block is among the first few.
    let stamped =
        before.chunks(BLOCK).position(|block| block.starts_with(b"a stamp")).expect("a stamp");
    image.write_all_at(&[0xff], (stamped * BLOCK + 2000) as u64).expect("damage");
    assert_eq!(damage(&peer.socket, &first.ledgers).len(), 1, "one block was damaged");
    image.write_all_at(&before, 0).expect("repaired");
    assert_intact(&peer.socket, &first.ledgers);

    let second = peer.resume(&options, first.ledgers);
    second.wait_for(20_000);
    image.write_all_at(&before, 0).expect("all of the second load's writes undone");
    second.wait_for(5_000);
    assert!(second.faults() > 0);
    assert!(second.stop().mismatches > 0, "lost writes went unnoticed");
}

#[test]
fn a_device_that_stops_answering_is_a_result_not_a_hang() {
    let Some(peer) = Peer::start() else { return };
    let options = LoadOptions { patience: 4 * SECOND, ..LoadOptions::new(2, 8) };
    let load = Load::start(&peer.socket, &options);
    load.wait_for(100);
    peer.signal(Signal::STOP);
    let deadline = Instant::now() + PATIENCE;
    while load.faults() == 0 {
        assert!(Instant::now() < deadline, "a device that is stopped is not noticed");
        thread::sleep(Duration::from_millis(20));
    }
    let report = load.stop();
    peer.signal(Signal::CONT);
    assert!(report.unanswered > 0, "{report:?}");
    assert_eq!((report.errors, report.mismatches, report.spurious), (0, 0, 0), "{report:?}");
}

#[test]
fn requests_left_in_flight_leave_the_ledger_in_doubt_but_not_wrong() {
    let Some(mut peer) = Peer::start() else { return };
    let options = LoadOptions::new(2, 32);
    let load = Load::start(&peer.socket, &options);
    load.wait_for(1000);
    let report = load.abandon();
    report.assert_clean();
    let load = peer.resume(&options, report.ledgers);
    load.wait_for(10_000);
    load.stop().assert_clean();
}
