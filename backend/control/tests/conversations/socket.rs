//! The path that clients connect to: who gets it, who may use it, and what is removed.

use crate::common::*;
use control::{Server, SocketError, SocketFile};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn the_socket_is_private_from_the_first_instant() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    // Without a umask to hide behind. The other tests of this process make nothing that it matters
    // for.
    let umask = rustix::process::umask(rustix::fs::Mode::empty());
    let done = AtomicBool::new(false);
    let seen = thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let mut seen = std::collections::BTreeSet::new();
            while !done.load(Ordering::SeqCst) {
                seen.extend(
                    path.symlink_metadata().map(|metadata| metadata.permissions().mode() & 0o7777),
                );
            }
            seen
        });
        for _ in 0..300 {
            let server = Server::start(&path, Arc::new(Mock::default())).unwrap();
            server.stop();
        }
        done.store(true, Ordering::SeqCst);
        looking.join().unwrap()
    });
    rustix::process::umask(umask);
    assert_eq!(Vec::from_iter(seen), [0o600]);
}

#[test]
fn a_path_is_taken_from_the_dead_only() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.metadata().unwrap().file_type().is_socket(), "the remains are there");
    let server = Server::start(&path, Arc::new(Mock::default())).expect("the remains are replaced");
    let inode = path.metadata().unwrap().ino();

    let refused = Server::start(&path, Arc::new(Mock::default())).unwrap_err();
    assert!(matches!(&refused, SocketError::InUse(of) if *of == path), "{refused:?}");
    assert!(refused.to_string().contains("another daemon"), "{refused}");
    assert_eq!(path.metadata().unwrap().ino(), inode, "the living daemon's socket was touched");
    Client::connect(&path).works();
    assert_eq!(server.stop(), 0);
    assert!(!path.exists(), "the socket is left");

    std::fs::write(&path, "precious").unwrap();
    let refused = Server::start(&path, Arc::new(Mock::default())).unwrap_err();
    assert!(matches!(refused, SocketError::NotASocket(_)), "{refused:?}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let nowhere =
        Server::start(&directory.path().join("no/control"), Arc::new(Mock::default())).unwrap_err();
    assert!(matches!(nowhere, SocketError::System { .. }), "{nowhere:?}");
    assert!(nowhere.to_string().contains("No such file"), "{nowhere}");
    let empty = SocketFile::listen(Path::new(""), 0o600).unwrap_err();
    assert!(matches!(empty, SocketError::System { .. }), "{empty:?}");
    let long = SocketFile::listen(&directory.path().join("x".repeat(200)), 0o600).unwrap_err();
    assert!(matches!(long, SocketError::System { .. }), "{long:?}");
}

#[test]
fn a_full_backlog_is_a_living_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    let socket = SocketFile::listen(&path, 0o600).unwrap();
    let clients: Vec<UnixStream> = (0..129).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let refused = SocketFile::listen(&path, 0o600).unwrap_err();
    assert!(matches!(refused, SocketError::InUse(_)), "{refused:?}");
    drop((clients, socket));
}

/// Eight that want a path at once; those who got it.
fn at_once(path: &Path) -> Vec<SocketFile> {
    let together = Barrier::new(8);
    thread::scope(|scope| {
        let listen = || {
            together.wait();
            SocketFile::listen(path, 0o600)
        };
        let starting = [(); 8].map(|()| scope.spawn(listen));
        starting.into_iter().filter_map(|one| one.join().unwrap().ok()).collect()
    })
}

#[test]
fn of_daemons_that_start_at_once_one_gets_the_path() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..300 {
        let path = directory.path().join(round.to_string());
        drop(UnixListener::bind(&path).unwrap());
        let won = at_once(&path);
        assert_eq!(won.len(), 1, "round {round}");
        UnixStream::connect(&path).expect("the one that won listens there");
    }
}

#[test]
fn a_new_path_goes_to_one_even_if_the_directory_cannot_be_locked() {
    let directory = tempfile::tempdir().unwrap();
    let locked = std::fs::File::open(directory.path()).unwrap();
    rustix::fs::flock(&locked, rustix::fs::FlockOperation::LockExclusive).unwrap();
    for round in 0..4 {
        let path = directory.path().join(round.to_string());
        let won = at_once(&path);
        assert_eq!(won.len(), 1, "round {round}");
        UnixStream::connect(&path).expect("the one that won listens there");
        std::mem::forget(won);
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 4, "other names are left");
}

#[test]
fn remains_go_to_one_even_if_the_directory_cannot_be_locked() {
    let directory = tempfile::tempdir().unwrap();
    let locked = std::fs::File::open(directory.path()).unwrap();
    rustix::fs::flock(&locked, rustix::fs::FlockOperation::LockExclusive).unwrap();
    for round in 0..6 {
        let path = directory.path().join(round.to_string());
        drop(UnixListener::bind(&path).unwrap());
        let won = at_once(&path);
        assert_eq!(won.len(), 1, "round {round}");
        UnixStream::connect(&path).expect("the one that won listens there");
        won[0].listener().set_nonblocking(true).unwrap();
        // Others may have looked before it came.
        while won[0].listener().accept().is_ok() {}
        UnixStream::connect(&path).unwrap();
        won[0].listener().accept().expect("the one that won has the path");
        std::mem::forget(won);
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 6, "other names are left");
}

#[test]
fn a_socket_that_can_be_seen_can_be_connected_to() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..3000 {
        let path = directory.path().join(round.to_string());
        let together = Barrier::new(2);
        thread::scope(|scope| {
            let looking = scope.spawn(|| {
                together.wait();
                let deadline = Instant::now() + Duration::from_secs(20);
                while path.symlink_metadata().is_err() {
                    assert!(Instant::now() < deadline, "round {round}: it never comes");
                }
                UnixStream::connect(&path)
            });
            together.wait();
            let socket = SocketFile::listen(&path, 0o600).unwrap();
            looking.join().unwrap().unwrap_or_else(|error| panic!("round {round}: {error}"));
            drop(socket);
        });
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "something is left");
}

#[test]
fn what_was_left_between_the_two_names_goes_with_the_next_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for dead in
        ["socket~abcdefgh", "socket~22223333", "socket~short", "socket~abcdefg8", "other~abcdefgh"]
    {
        drop(UnixListener::bind(path(dead)).unwrap());
    }
    let _living = UnixListener::bind(path("socket~zzzzzzzz")).unwrap();
    std::fs::write(path("socket~aaaaaaaa"), "precious").unwrap();
    let socket = SocketFile::listen(&path("socket"), 0o600).unwrap();
    let mut names: Vec<_> = std::fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    let stay = [
        "other~abcdefgh",
        "socket",
        "socket~aaaaaaaa",
        "socket~abcdefg8",
        "socket~short",
        "socket~zzzzzzzz",
    ];
    assert_eq!(names, stay);
    drop(socket);
}

#[test]
fn every_path_that_fits_a_socket_can_be_listened_on() {
    let directory = tempfile::tempdir().unwrap();
    let long = directory.path().as_os_str().len() + 1;
    for name in [1, 2, 3, 9, 10, 11, 30] {
        // Directories in between, so that path and name have the length that is wanted.
        let between = directory.path().join("d".repeat(107 - long - 1 - name));
        std::fs::create_dir(&between).unwrap();
        for letter in ["~", "-", "x"] {
            let path = between.join(letter.repeat(name));
            assert_eq!(path.as_os_str().len(), 107);
            for _ in 0..3 {
                let socket = SocketFile::listen(&path, 0o600).unwrap();
                UnixStream::connect(&path).unwrap();
                assert_eq!(std::fs::read_dir(&between).unwrap().count(), 1, "{name}");
                drop(socket);
                drop(UnixListener::bind(&path).unwrap());
            }
            std::fs::remove_file(&path).unwrap();
        }
        std::fs::remove_dir(&between).unwrap();
    }
    let like_a_directory =
        SocketFile::listen(&directory.path().join("socket/"), 0o600).unwrap_err();
    assert!(matches!(like_a_directory, SocketError::System { .. }), "{like_a_directory:?}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn only_our_own_socket_is_removed() {
    let fixture = fixture();
    let path = fixture.server.path().to_owned();
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    fixture.server.stop();
    assert!(path.exists(), "another's socket was removed");
    drop(other);
}

#[test]
fn a_name_is_removed_once_and_only_if_it_is_ours() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let first = SocketFile::listen(&path, 0o600).unwrap();
    let name = Arc::clone(first.name());
    drop(first);
    assert!(!path.exists());
    // The first one's inode number may well be the second one's now.
    let second = SocketFile::listen(&path, 0o600).unwrap();
    name.remove();
    assert!(path.exists(), "a name that is gone has removed another's");
    let name = Arc::clone(second.name());
    name.remove();
    assert!(!path.exists(), "it can be removed under its owner");
    let third = SocketFile::listen(&path, 0o600).unwrap();
    drop(second);
    assert!(path.exists(), "an owner without a name has removed another's");
    drop(third);
    assert!(!path.exists());
}

#[test]
fn a_socket_is_resumed_with_its_name_and_removes_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let socket = SocketFile::listen(&path, 0o600).unwrap();
    let kept = serde_json::to_string(&socket.keep()).unwrap();
    let listener = socket.listener().as_fd().try_clone_to_owned().unwrap();
    // As if its process had another program now.
    std::mem::forget(socket);
    let resumed = SocketFile::resume(serde_json::from_str(&kept).unwrap(), listener);
    UnixStream::connect(&path).unwrap();
    drop(resumed);
    assert!(!path.exists());
}
