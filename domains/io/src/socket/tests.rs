use super::*;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

fn eventfd_of_a_worker() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

/// Whether the eventfd is written to in that time.
fn wakes_within(eventfd: &OwnedFd, seconds: i64) -> bool {
    let mut it = [PollFd::new(eventfd, PollFlags::IN)];
    let came = poll(&mut it, Some(&Timespec { tv_sec: seconds, tv_nsec: 0 })).unwrap() > 0;
    came && rustix::io::read(eventfd, &mut [0; 8]).is_ok()
}

fn wakes(eventfd: &OwnedFd) -> bool {
    wakes_within(eventfd, 60)
}

/// A watch of each kind that there is here, and its eventfd.
fn each_kind() -> Vec<(Watch, OwnedFd)> {
    let (of_ring, of_thread) = (eventfd_of_a_worker(), eventfd_of_a_worker());
    let ring = Watch::by_ring(of_ring.try_clone().unwrap());
    if let Err(error) = &ring {
        eprintln!("skipped: no io_uring ({error})");
    }
    let spawn = |task: Task| std::thread::Builder::new().spawn(task).map(drop);
    let thread = Watch::by_thread(of_thread.try_clone().unwrap(), spawn).unwrap();
    ring.into_iter()
        .map(|ring| (ring, of_ring.try_clone().unwrap()))
        .chain([(thread, of_thread)])
        .collect()
}

#[test]
fn each_arrival_and_the_end_wake_and_a_forgotten_socket_does_not() {
    for (mut watch, wake) in each_kind() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(peer_process(ours.as_fd()), Some(std::process::id()));
        watch.reading(7, ours.as_fd()).unwrap();
        for byte in 0..3 {
            theirs.write_all(&[byte]).unwrap();
            assert!(wakes(&wake), "byte {byte}");
            ours.read_exact(&mut [0]).unwrap();
            if let Some(News::Unwatched(name)) = watch.take() {
                watch.reading(name, ours.as_fd()).unwrap();
            }
        }
        watch.writing(7, ours.as_fd()).unwrap();
        assert!(wakes(&wake), "it can be written to");
        assert_eq!(watch.take(), Some(News::Writable(7)));
        let (other, mut others) = UnixStream::pair().unwrap();
        watch.reading(8, other.as_fd()).unwrap();
        watch.forget(8);
        while wakes_within(&wake, 1) {}
        others.write_all(&[1]).unwrap();
        assert!(!wakes_within(&wake, 1), "forgotten");
        theirs.write_all(&[4]).unwrap();
        assert!(wakes(&wake), "still watched for reading");
        ours.read_exact(&mut [0]).unwrap();
        drop(theirs);
        assert!(wakes(&wake), "the end");
    }
}

/// It says so when there is room, not before.
#[test]
fn a_full_socket_is_writable_once_it_has_been_read() {
    for (mut watch, wake) in each_kind() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while let Ok(count) = ours.write(&[0; 4096]) {
            sent += count;
        }
        watch.writing(1, ours.as_fd()).unwrap();
        assert!(!wakes_within(&wake, 1) && watch.take().is_none());
        theirs.read_exact(&mut vec![0; sent]).unwrap();
        assert!(wakes(&wake));
        assert_eq!(watch.take(), Some(News::Writable(1)));
        // Not again, when nobody has asked.
        while wakes_within(&wake, 1) {}
        let _ = ours.write(&[0; 4096]);
        theirs.read_exact(&mut [0; 4096]).unwrap();
        assert!(!wakes_within(&wake, 1) && watch.take().is_none());
    }
}

#[test]
fn the_thread_ends_with_its_watch() {
    let (ended, end) = mpsc::channel();
    let spawn = move |task: Task| {
        let run = move || {
            task();
            ended.send(()).unwrap();
        };
        std::thread::Builder::new().spawn(run).map(drop)
    };
    let mut watch = Watch::by_thread(eventfd_of_a_worker(), spawn).unwrap();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    watch.reading(1, ours.as_fd()).unwrap();
    assert!(end.recv_timeout(Duration::from_millis(100)).is_err());
    drop(watch);
    end.recv_timeout(Duration::from_secs(60)).unwrap();
}

#[test]
fn without_a_thread_there_is_no_watch() {
    let refusal = Watch::by_thread(eventfd_of_a_worker(), |_| Err("none left")).unwrap_err();
    assert!(refusal.to_string().contains("none left"));
}
