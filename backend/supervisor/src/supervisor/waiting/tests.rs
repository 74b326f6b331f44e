//! Tests of who has the server, and of what it says of a session's end. A server says what a test
//! has it say; what it is told comes out at the other end of its channel.

use super::*;
use crate::supervisor::Which;
use crate::supervisor::scripted::{self, serving};
use channel::{Channel, Received, ToServer, ToSupervisor};
use rustix::event::PollFlags;
use std::os::unix::net::UnixStream;
use std::path::Path;
use tempfile::TempDir;

/// One whose server serves, the other end of that server's channel, and where its sockets are.
fn stage() -> (Supervisor, Channel, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let mut supervisor = serving(directory.path());
    let (channel, other) = channel::pair().unwrap();
    supervisor.server.as_mut().unwrap().channel = channel;
    (supervisor, Channel::from_socket(other), directory)
}

/// A frontend connects, and is let in.
fn connect(supervisor: &mut Supervisor, directory: &Path) -> UnixStream {
    let stream = UnixStream::connect(directory.join("disk")).unwrap();
    supervisor.accept();
    stream
}

/// The sessions that a server was given since it was asked last.
fn sessions_given(other: &Channel) -> Vec<u64> {
    let mut given = Vec::new();
    while let Ok(Received::Message(message, _)) = other.try_receive() {
        if let ToServer::Session(session) = message {
            given.push(session.number);
        }
    }
    given
}

fn ended(number: u64) -> ToSupervisor {
    ToSupervisor::SessionEnded { number, error: None }
}

#[test]
fn a_frontend_that_goes_in_its_turn_takes_nothing_from_the_other() {
    let (mut stage, other, directory) = stage();
    let _first = connect(&mut stage, directory.path());
    let second = connect(&mut stage, directory.path());
    assert!(stage.waiting.is_some());
    // The second one's turn has come, and the server has not left the first yet.
    stage.take_turns();
    assert_eq!(stage.session.as_ref().unwrap().number, 2);
    drop(second);
    stage.session.as_mut().unwrap().frontend_is_ready(PollFlags::HUP);
    stage.settle_session();
    stage.settle_waiting(Instant::now());
    assert_eq!(sessions_given(&other), [1], "the server has not left it");
    // It leaves it now, and that is no end of the session's next time.
    stage.told_by(Which::Current, ended(1), Vec::new());
    stage.settle_session();
    stage.settle_waiting(Instant::now());
    let session = stage.session.as_ref().expect("the first one's session");
    assert_eq!((session.number, session.over()), (1, None));
    assert_eq!(sessions_given(&other), [1]);
}

#[test]
fn a_stopped_server_may_say_that_a_session_has_ended() {
    let (mut stage, other, directory) = stage();
    let _frontend = connect(&mut stage, directory.path());
    assert_eq!(sessions_given(&other), [1]);
    stage.stopped = stage.server.take();
    stage.server = Some(scripted::server());
    stage.told_by(Which::Stopped, ended(1), Vec::new());
    stage.server = stage.stopped.take();
    stage.settle_session();
    assert!(stage.session.is_none(), "a frontend is connected to nothing");
    assert_eq!(stage.ending_session, None);
    // The next one is served.
    let _next = connect(&mut stage, directory.path());
    assert_eq!(sessions_given(&other), [2]);
}
