//! Clients of the control socket, as the loop has them.

use super::*;
use std::io::{ErrorKind, Read};

/// Its number may be that of a client soon, and the daemon may be left alone for weeks.
#[test]
fn a_server_that_has_ended_is_forgotten_when_no_client_waits() {
    let mut stage = Stage::new(None);
    let server = stage.serve();
    let supervisor = &mut stage.supervisor;
    let front = supervisor.front.as_mut().unwrap();
    let path = front.socket().name().path().to_owned();
    front.servers_are(vec![std::process::id()], false);
    // A turn in which something else happens.
    say(&server, &ToSupervisor::Look);
    supervisor.turn().unwrap();
    let mut client = UnixStream::connect(path).unwrap();
    supervisor.turn().unwrap();
    client.set_nonblocking(true).unwrap();
    let refused = client.read(&mut [0; 512]);
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::WouldBlock, "it is a client as any other");
}
