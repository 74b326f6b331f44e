//! The ring, on pipes and files.
//!
//! A read of an empty pipe stays in flight until there is a write, which makes everything that is
//! about time a matter of the test's own choice.

use super::*;
use domain_abi::{RawRequest, RawSegment, op};
use domain_api::Batch;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

/// A request and its memory, which is leaked unless the test is over.
struct Guest {
    memory: Vec<Vec<u8>>,
    segments: Vec<RawSegment>,
}

impl Guest {
    fn new(lengths: &[usize], fill: u8) -> Self {
        let mut memory: Vec<Vec<u8>> = lengths.iter().map(|&len| vec![fill; len]).collect();
        // SAFETY: the vectors do not move, and are looked at only when the request has ended.
        let segments = memory
            .iter_mut()
            .map(|piece| unsafe { RawSegment::new(piece.as_mut_ptr(), piece.len()) });
        let segments = segments.collect();
        Self { memory, segments }
    }

    fn request(&self, op: u32, offset: u64, tag: u64) -> Request {
        let len = self.segments.iter().map(RawSegment::len).sum::<usize>() as u64;
        raw(op, offset, len, &self.segments, tag)
    }
}

fn raw(op: u32, offset: u64, len: u64, segments: &[RawSegment], tag: u64) -> Request {
    // SAFETY: the tests keep `segments` until the request has ended.
    let mut raw = unsafe { RawRequest::new(op, 0, offset, len, segments) };
    raw.tag = tag;
    // SAFETY: it is offered once.
    unsafe { Batch::new(&[raw], &mut 0).next() }.expect("it is there")
}

fn eventfd() -> File {
    // SAFETY: no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    // SAFETY: a fresh descriptor.
    unsafe { File::from_raw_fd(fd) }
}

fn pipe() -> (File, File) {
    let (reading, writing) = io::pipe().unwrap();
    (File::from(OwnedFd::from(reading)), File::from(OwnedFd::from(writing)))
}

fn files(file: &File) -> Files<'_> {
    Files { image: file, sync: file, witness: file }
}

fn ring(file: &File, depth: usize) -> Option<(Ring, File)> {
    let wake = eventfd();
    match Ring::new(files(file), wake.try_clone().unwrap().into(), depth) {
        Ok(ring) => Some((ring, wake)),
        Err(error) => {
            eprintln!("skipped: no io_uring here: {error}");
            None
        }
    }
}

/// Sleeps as a worker does, until the ring rings.
fn sleep(wake: &File) {
    let mut watched = libc::pollfd { fd: wake.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid structure.
    let woken = unsafe { libc::poll(&raw mut watched, 1, 10_000) };
    assert_eq!(woken, 1, "nothing woke us");
    (&*wake).read_exact(&mut [0; 8]).unwrap();
}

fn next(ring: &mut Ring, wake: &File) -> Ended {
    loop {
        if let Some(ended) = ring.advance() {
            return ended;
        }
        sleep(wake);
    }
}

fn scratch(name: &str) -> File {
    let path = std::env::temp_dir().join(format!("hotswap-uring-{name}-{}", std::process::id()));
    let file =
        File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

#[test]
fn each_completion_wakes_a_sleeper_however_it_races_with_him() {
    let (reading, writing) = pipe();
    let Some((mut ring, wake)) = ring(&reading, 4) else { return };
    let guest = Guest::new(&[1], 0);
    std::thread::scope(|scope| {
        let (asked, asks) = std::sync::mpsc::channel::<u32>();
        scope.spawn(move || {
            for pause in asks {
                (0..pause).for_each(|_| std::hint::spin_loop());
                (&writing).write_all(&[7]).unwrap();
            }
        });
        for round in 0..20_000 {
            ring.push(guest.request(op::READ, 0, round), Work::Read, 0);
            asked.send((round % 997) as u32).unwrap();
            let ended = next(&mut ring, &wake);
            assert_eq!(ended.request.id().tag, round);
            ended.result.unwrap();
        }
    });
    assert_eq!(guest.memory[0], [7]);
}

/// Linux hands over 20 completions at a time. One that comes while the rest is being handed over
/// goes with it, and is announced all the same: a few times in these rounds. A ring
/// that believes it waits for what does not exist; one that does not look again misses what comes
/// next.
#[test]
fn an_announcement_of_nothing_is_not_waited_for() {
    const ROUNDS: u32 = 10_000;
    let (finished, progress) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let (reading, writing) = pipe();
        let Some((mut ring, wake)) = ring(&reading, 32) else { return };
        let guests: Vec<Guest> = (0..32).map(|_| Guest::new(&[1], 0)).collect();
        let (ask, asked) = std::sync::mpsc::channel::<u32>();
        std::thread::spawn(move || {
            for pause in asked {
                (&writing).write_all(&[7; 23]).unwrap();
                for _ in 0..9 {
                    (0..pause).for_each(|_| std::hint::spin_loop());
                    (&writing).write_all(&[7]).unwrap();
                }
            }
        });
        let mut of_nothing = 0;
        for round in 0..ROUNDS {
            for (tag, guest) in (0..).zip(&guests) {
                ring.push(guest.request(op::READ, 0, tag), Work::Read, 0);
            }
            assert!(ring.advance().is_none());
            ask.send(round % 97).unwrap();
            for _ in &guests {
                next(&mut ring, &wake).result.unwrap();
            }
            assert!(ring.advance().is_none());
            of_nothing += u32::from(ring.io.submission().taskrun());
            finished.send(of_nothing).unwrap();
        }
    });
    let mut last = None;
    for round in 0..ROUNDS {
        use std::sync::mpsc::RecvTimeoutError::{Disconnected, Timeout};
        match progress.recv_timeout(Duration::from_secs(10)) {
            Ok(of_nothing) => last = Some(of_nothing),
            Err(Timeout) => panic!("round {round}: the ring still waits for what does not exist"),
            Err(Disconnected) => {
                assert!(last.is_none(), "round {round}: see above");
                return;
            }
        }
    }
    eprintln!("{ROUNDS} rounds, {} ended with an announcement of nothing", last.unwrap_or(0));
}

#[test]
fn a_full_ring_has_no_room_and_loses_nothing() {
    let (reading, writing) = pipe();
    let Some((mut ring, wake)) = ring(&reading, 5) else { return };
    let guests: Vec<Guest> = (0..5).map(|_| Guest::new(&[1], 0)).collect();
    for (tag, guest) in guests.iter().enumerate() {
        assert!(ring.has_room());
        ring.push(guest.request(op::READ, 0, tag as u64), Work::Read, 0);
    }
    assert!(!ring.has_room());
    assert!(ring.advance().is_none());
    assert_eq!(ring.in_flight(), 5);
    (&writing).write_all(&[1; 5]).unwrap();
    let mut tags: Vec<u64> = (0..5).map(|_| next(&mut ring, &wake).request.id().tag).collect();
    tags.sort_unstable();
    assert_eq!(tags, [0, 1, 2, 3, 4]);
    assert!(ring.advance().is_none() && ring.in_flight() == 0);
}

/// Pushes eight reads of a pipe that has so many bytes. Returns how many waited to be submitted
/// after each, and whether any was answered in the call.
fn pushes(bytes: &[u8]) -> Option<(Vec<usize>, bool)> {
    let (reading, writing) = pipe();
    let (mut ring, wake) = ring(&reading, 16)?;
    (&writing).write_all(bytes).unwrap();
    let guests: Vec<Guest> = (0..8).map(|_| Guest::new(&[1], 0)).collect();
    let mut waiting = Vec::new();
    for (tag, guest) in guests.iter().enumerate() {
        ring.push(guest.request(op::READ, 0, tag as u64), Work::Read, 0);
        waiting.push(ring.io.submission().len());
    }
    let answered = !ring.io.completion().is_empty();
    (&writing).write_all(&vec![1; 8 - bytes.len()]).unwrap();
    for _ in &guests {
        next(&mut ring, &wake).result.unwrap();
    }
    Some((waiting, answered))
}

#[test]
fn a_device_that_takes_its_time_has_the_first_before_the_last_is_pushed() {
    let Some((waiting, _)) = pushes(&[]) else { return };
    assert_eq!(waiting, [1, 2, 3, 0, 1, 2, 3, 0]);
}

#[test]
fn a_device_that_answers_at_once_is_given_the_rest_together() {
    let Some((waiting, answered)) = pushes(&[1; 8]) else { return };
    if !answered {
        eprintln!("skipped: this kernel reads pipes later (Linux before 6.4)");
        return;
    }
    assert_eq!(waiting, [1, 2, 3, 0, 1, 2, 3, 4]);
}

#[test]
fn a_short_transfer_is_finished_by_more_of_them() {
    let (reading, writing) = pipe();
    let Some((mut ring, wake)) = ring(&reading, 1) else { return };
    let guest = Guest::new(&[3, 0, 1, 4, 2], 0);
    ring.push(guest.request(op::READ, 0, 1), Work::Read, 0);
    for piece in [&[1u8, 2][..], &[3, 4, 5], &[6, 7, 8], &[9], &[10]] {
        assert!(ring.advance().is_none());
        (&writing).write_all(piece).unwrap();
        if piece != [10] {
            sleep(&wake);
        }
    }
    next(&mut ring, &wake).result.unwrap();
    assert_eq!(guest.memory.concat(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    // The writer goes away: the file has ended.
    ring.push(guest.request(op::READ, 0, 2), Work::Read, 0);
    assert!(ring.advance().is_none());
    drop(writing);
    assert_eq!(next(&mut ring, &wake).result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn more_segments_than_one_call_takes_go_by_several() {
    let file = scratch("segments");
    let Some((mut ring, wake)) = ring(&file, 2) else { return };
    let lengths: Vec<usize> = (0..2500).map(|i| i % 5).collect();
    let mut out = Guest::new(&lengths, 0);
    out.memory.iter_mut().enumerate().for_each(|(i, piece)| piece.fill(i as u8));
    ring.push(out.request(op::WRITE, 512, 1), Work::Write { durable: true }, 0);
    next(&mut ring, &wake).result.unwrap();
    let back = Guest::new(&[1000, lengths.iter().sum::<usize>() - 1000], 0);
    ring.push(back.request(op::READ, 512, 2), Work::Read, 0);
    next(&mut ring, &wake).result.unwrap();
    assert_eq!(back.memory.concat(), out.memory.concat());
    // Begun elsewhere, up to byte 1500.
    let rest = Guest::new(&[1000, lengths.iter().sum::<usize>() - 1000], 0xee);
    ring.push(rest.request(op::READ, 512, 3), Work::Read, 1500);
    next(&mut ring, &wake).result.unwrap();
    let rest = rest.memory.concat();
    assert!(
        rest[..1500].iter().all(|&byte| byte == 0xee)
            && rest[1500..] == out.memory.concat()[1500..]
    );
}

#[test]
fn ranges_are_zeroed_in_all_ways_and_errors_come_back() {
    let file = scratch("ranges");
    file.write_all_at(&vec![1; 2 << 20], 0).unwrap();
    let Some((mut ring, wake)) = ring(&file, 4) else { return };
    let (len, mut at) = (600u64 << 10, 4096);
    for work in [Work::WriteZeros, Work::PunchHole, Work::ZeroRange] {
        ring.push(raw(op::WRITE_ZEROES, at, len, &[], 1), work, 0);
        let ended = next(&mut ring, &wake);
        assert_eq!(ended.work, work);
        match ended.result {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                assert_ne!(work, Work::WriteZeros);
                continue;
            }
            result => result.unwrap(),
        }
        let mut back = vec![9; len as usize + 2];
        file.read_exact_at(&mut back, at - 1).unwrap();
        let (first, rest) = back.split_first().unwrap();
        let (last, zeros) = rest.split_last().unwrap();
        assert!(*first == 1 && *last == 1 && zeros.iter().all(|&byte| byte == 0), "{work:?}");
        at += len + 4096;
    }
    ring.push(raw(op::FLUSH, 0, 0, &[], 2), Work::SyncData, 0);
    next(&mut ring, &wake).result.unwrap();
    let (reading, _writing) = pipe();
    let Some((mut ring, wake)) = self::ring(&reading, 4) else { return };
    ring.push(raw(op::FLUSH, 0, 0, &[], 3), Work::SyncData, 0);
    assert_eq!(next(&mut ring, &wake).result.unwrap_err().raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn cancelling_ends_what_waits_and_nothing_that_comes_later() {
    let (reading, writing) = pipe();
    let Some((mut ring, wake)) = ring(&reading, 8) else { return };
    ring.cancel();
    let guests: Vec<Guest> = (0..8).map(|_| Guest::new(&[1], 0)).collect();
    for (tag, guest) in guests.iter().enumerate() {
        ring.push(guest.request(op::READ, 0, tag as u64), Work::Read, 0);
    }
    assert!(ring.advance().is_none());
    ring.cancel();
    ring.cancel();
    for _ in 0..8 {
        assert_eq!(
            next(&mut ring, &wake).result.unwrap_err().raw_os_error(),
            Some(libc::ECANCELED)
        );
    }
    assert!(ring.advance().is_none());
    ring.push(guests[0].request(op::READ, 0, 9), Work::Read, 0);
    assert!(ring.advance().is_none());
    (&writing).write_all(&[5]).unwrap();
    next(&mut ring, &wake).result.unwrap();
    assert_eq!(guests[0].memory[0], [5]);
}

/// Nothing may be written to a request's memory after its ring is gone.
fn is_over_after_drop(drop_it: impl FnOnce(Ring)) {
    let (reading, writing) = pipe();
    let Some((mut ring, _wake)) = ring(&reading, 8) else { return };
    let guests: Vec<Guest> = (0..8).map(|_| Guest::new(&[1, 2], 0)).collect();
    for (tag, guest) in guests.iter().enumerate() {
        ring.push(guest.request(op::READ, 0, tag as u64), Work::Read, 0);
    }
    assert!(ring.advance().is_none());
    drop_it(ring);
    (&writing).write_all(&[7; 24]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(guests.iter().all(|guest| guest.memory.concat() == [0; 3]));
    // All that was written is still there for others: no request of the ring has taken any.
    (&reading).read_exact(&mut [0; 24]).unwrap();
}

#[test]
fn a_ring_that_is_dropped_with_requests_in_flight_waits_for_the_kernel() {
    is_over_after_drop(drop);
}

#[test]
fn it_may_be_dropped_by_a_thread_that_it_does_not_belong_to() {
    is_over_after_drop(|ring| std::thread::spawn(|| drop(ring)).join().unwrap());
    // Its own thread may be gone, too.
    let (reading, writing) = pipe();
    let guest = Guest::new(&[1], 0);
    let request = guest.request(op::READ, 0, 1);
    let made = std::thread::spawn(move || {
        let (mut ring, _wake) = ring(&reading, 1)?;
        ring.push(request, Work::Read, 0);
        assert!(ring.advance().is_none());
        Some((ring, reading))
    });
    let Some((ring, reading)) = made.join().unwrap() else { return };
    drop(ring);
    (&writing).write_all(&[7]).unwrap();
    (&reading).read_exact(&mut [0]).unwrap();
    assert_eq!(guest.memory[0], [0]);
}

#[test]
fn one_thread_prepares_a_ring_and_another_uses_it() {
    let (reading, writing) = pipe();
    let prepare = || PreparedRing::new(files(&reading), 4);
    let Ok(prepared) = std::thread::scope(|scope| scope.spawn(prepare).join().unwrap()) else {
        return;
    };
    let wake = eventfd();
    let (watch, held) = EndWatch::new().unwrap();
    let held = File::from(held);
    let mut ring = prepared.begin(wake.try_clone().unwrap().into(), &[&held]).unwrap();
    drop(held);
    let guest = Guest::new(&[1], 0);
    ring.push(guest.request(op::READ, 0, 1), Work::Read, 0);
    assert!(ring.advance().is_none());
    (&writing).write_all(&[3]).unwrap();
    next(&mut ring, &wake).result.unwrap();
    assert_eq!(guest.memory[0], [3]);
    assert!(!watch.is_over(), "the ring holds it");
    drop(ring);
    assert!(watch.wait(Duration::from_secs(60)));
}

#[test]
fn rings_come_and_go_without_leaving_descriptors() {
    let file = scratch("descriptors");
    let Some((first, _wake)) = ring(&file, 64) else { return };
    drop(first);
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    for _ in 0..100 {
        let (mut ring, wake) = ring(&file, 64).unwrap();
        ring.push(raw(op::FLUSH, 0, 0, &[], 0), Work::SyncData, 0);
        next(&mut ring, &wake).result.unwrap();
        // Nor do those that were never begun.
        drop(PreparedRing::new(files(&file), 64).unwrap());
    }
    // Tests run at the same time, and have a few open.
    assert!(open() < before + 50, "{before} descriptors became {}", open());
}

#[test]
fn memory_of_its_own_is_read_and_written_in_parts_and_up_to_the_end_of_the_file() {
    let file = scratch("aligned");
    file.write_all_at(&[7; 6000], 0).unwrap();
    let Some((mut ring, wake)) = ring(&file, 4) else { return };
    let request = || raw(op::FLUSH, 0, 0, &[], 1);
    let mut aligned = Box::new(Aligned::new(4096, 4096));
    assert_eq!(aligned.bytes().as_ptr().align_offset(4096), 0);
    aligned.set_window(512..4096);
    ring.push_aligned(request(), Work::ReadAligned, aligned);
    let ended = next(&mut ring, &wake);
    ended.result.unwrap();
    let mut aligned = ended.aligned.expect("it comes back");
    assert_eq!(aligned.moved(), 6000 - 4096 - 512, "the file ends there");
    assert_eq!(aligned.bytes()[511..514], [0, 7, 7]);
    aligned.bytes_mut().fill(9);
    aligned.set_window(1024..2048);
    ring.push_aligned(request(), Work::WriteAligned { durable: true }, aligned);
    next(&mut ring, &wake).result.unwrap();
    let mut found = vec![0; 6000];
    file.read_exact_at(&mut found, 0).unwrap();
    let written = 4096 + 1024..4096 + 2048;
    assert!(
        found
            .iter()
            .enumerate()
            .all(|(at, &byte)| byte == if written.contains(&at) { 9 } else { 7 })
    );
}

/// Whether nothing else has the file open for writing (`F_SETLEASE`, fcntl(2)).
fn is_open_once(file: &File) -> bool {
    // SAFETY: no pointers.
    let code = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
    if code == 0 {
        // SAFETY: as above.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
    }
    code == 0
}

#[test]
fn released_files_are_closed_at_once() {
    let path = std::env::temp_dir().join(format!("hotswap-release-{}", std::process::id()));
    let make =
        || File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
    let ours = make();
    for prepared in [true, false] {
        let theirs = make();
        assert!(!is_open_once(&ours), "leases tell nothing here");
        if prepared {
            let ring = PreparedRing::new(files(&theirs), 4);
            drop(theirs);
            drop(ring);
        } else {
            let Some((mut ring, wake)) = ring(&theirs, 4) else { return };
            drop(theirs);
            let guest = Guest::new(&[512], 1);
            ring.push(guest.request(op::WRITE, 0, 1), Work::Write { durable: false }, 0);
            next(&mut ring, &wake).result.unwrap();
            ring.release_files();
        }
        assert!(is_open_once(&ours), "prepared: {prepared}");
    }
    std::fs::remove_file(path).unwrap();
}
