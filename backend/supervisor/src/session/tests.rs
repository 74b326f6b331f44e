use super::*;
use crate::journal::{descriptor_message, state_message, u64_message};
use crate::region::Region;
use crate::request;
use rustix::net::accept;
use rustix::net::sockopt::socket_peercred;
use std::os::unix::net::UnixStream;

#[test]
fn a_session_that_its_server_has_ended_is_given_to_no_other() {
    let (frontend, _other) = UnixStream::pair().unwrap();
    let relay = Relay::new(Region::own(1).unwrap(), None, 128);
    let mut session = Session::new(1, frontend.into(), relay);
    assert!(session.is_to_be_given());
    session.server_has_ended_it();
    assert!(!session.is_to_be_given());
}

#[test]
fn a_session_is_given_once_until_its_server_says_that_it_has_left_it() {
    let (frontend, _other) = UnixStream::pair().unwrap();
    let relay = Relay::new(Region::own(1).unwrap(), None, 128);
    let mut session = Session::new(1, frontend.into(), relay);
    let (ours, theirs) = channel::pair().unwrap();
    session.give_to(&ours, &Deaths::default()).unwrap();
    // The server closes its end, and still has the session.
    let server = Channel::from_socket(theirs);
    let said = server.receive::<ToServer>().unwrap().unwrap();
    let (ToServer::Session(_), descriptors) = said else { panic!("{said:?}") };
    drop(accept(&descriptors[0]).unwrap());
    session.pump(Some(&ours));
    assert!(session.inner().is_none() && session.over().is_none());
    assert!(!session.is_to_be_given());
    session.take_back();
    assert!(session.is_to_be_given());
}

#[test]
fn a_stranger_does_not_come_between_a_session_and_its_server() {
    let (listener, inner) = inner_connection().unwrap();
    // It knows the name, and finds no room.
    assert_eq!(connect_first(&listener).err(), Some(Errno::AGAIN));
    let accepted = accept(&listener).unwrap();
    rustix::io::write(&inner, b"x").unwrap();
    let mut byte = [0];
    assert_eq!(rustix::io::read(&accepted, &mut byte), Ok(1));
    assert_eq!(socket_peercred(&accepted).unwrap().pid, rustix::process::getpid());
    // One that was quicker is found out.
    let listener = inner_listener().unwrap();
    let _stranger = connect_first(&listener).unwrap();
    assert_eq!(connect_first(&listener).err(), Some(Errno::AGAIN));
}

/// A server behind a session, which answers what it is asked.
struct Behind {
    ours: Channel,
    _theirs: Channel,
    connection: Connection,
    heard: Vec<u32>,
}

impl Behind {
    fn of(session: &mut Session) -> Self {
        let (ours, theirs) = channel::pair().unwrap();
        session.give_to(&ours, &Deaths::default()).unwrap();
        let theirs = Channel::from_socket(theirs);
        let (_, descriptors) = theirs.receive::<ToServer>().unwrap().unwrap();
        let connection = Connection::new(accept(&descriptors[0]).unwrap());
        Self { ours, _theirs: theirs, connection, heard: Vec::new() }
    }

    /// So many turns; GET_VRING_BASE is answered if it `answers` that.
    fn turns(&mut self, session: &mut Session, turns: usize, answers: bool) {
        for _ in 0..turns {
            session.pump(Some(&self.ours));
            while let Incoming::Message(message) = self.connection.receive() {
                self.heard.push(message.request);
                if answers || message.request != request::GET_VRING_BASE {
                    let answer = Message::reply(message.request, [0; 8], Vec::new());
                    self.connection.send(&answer);
                }
            }
        }
    }

    fn has_heard_of_the_stop(&self) -> bool {
        self.heard.contains(&request::GET_VRING_BASE)
    }
}

/// As when the program is exchanged in place.
fn packed(session: Session) -> Session {
    let (text, names) = Descriptor::written(|| serde_json::to_string(&session).unwrap());
    Descriptor::named(names, || serde_json::from_str(&text).unwrap())
}

/// A frontend that has begun one ring, of which a server has taken something, and that asks
/// for its stop when the server is gone.
fn stopped_without_a_server(has_memory: bool, version: u8) -> (Session, Connection) {
    let (frontend, ours) = UnixStream::pair().unwrap();
    let region = Region::own(1).unwrap();
    let mut session = Session::new(1, frontend.into(), Relay::new(region, None, 128));
    let mut frontend = Connection::new(ours.into());
    let mut first = Behind::of(&mut session);
    let file = || Descriptor::from(channel::memfd("a file").unwrap());
    let table = [1, 0, 4096, 1 << 20, 0_u64].map(u64::to_le_bytes).concat();
    if has_memory {
        frontend.send(&Message::new(request::SET_MEM_TABLE, table, vec![file()]));
    }
    let addr = [0, 1 << 20, 1 << 20, 1 << 20, 0_u64].map(u64::to_le_bytes).concat();
    for message in [
        u64_message(request::SET_FEATURES, request::F_PROTOCOL_FEATURES),
        Message::new(request::SET_VRING_ADDR, addr, Vec::new()),
        descriptor_message(request::SET_VRING_KICK, 0, Some(file())),
        state_message(request::SET_VRING_ENABLE, 0, 1),
    ] {
        frontend.send(&message);
    }
    first.turns(&mut session, 10, true);
    assert_eq!(session.relay.journal().running(), [0]);
    let memfd = &session.relay.region().memfd;
    rustix::io::pwrite(memfd, &[version], 8).unwrap();
    frontend.send(&state_message(request::GET_VRING_BASE, 0, 0));
    first.turns(&mut session, 3, false);
    assert!(first.has_heard_of_the_stop());
    session.take_back();
    (session, frontend)
}

fn wait(server: &mut Behind, session: &mut Session) {
    let begun = Instant::now();
    while begun.elapsed() < RINGS_PATIENCE + Duration::from_millis(100) {
        server.turns(session, 1, true);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_ring_is_not_stopped_by_a_server_that_has_not_looked_at_it() {
    let (mut session, mut frontend) = stopped_without_a_server(true, 1);
    let mut server = Behind::of(&mut session);
    wait(&mut server, &mut session);
    assert!(session.relay.is_up() && !server.has_heard_of_the_stop());
    assert!(!session.rings_take_too_long(Instant::now()));
    // Another server is to do better.
    let late = Instant::now() + RINGS_TIMEOUT;
    assert!(session.rings_take_too_long(late) && !session.rings_take_too_long(late));
    session.take_back();
    let mut server = Behind::of(&mut session);
    server.turns(&mut session, 3, true);
    rustix::io::pwrite(&session.relay.region().memfd, &[0; 8], 0).unwrap();
    server.turns(&mut session, 3, true);
    assert!(server.has_heard_of_the_stop() && !session.relay.is_held());
    let Incoming::Message(answer) = frontend.receive() else { panic!("no answer") };
    assert_eq!(answer.request, request::GET_VRING_BASE);
}

#[test]
fn a_ring_whose_memory_is_missing_is_not_waited_for_for_ever() {
    let (mut session, _frontend) = stopped_without_a_server(false, 1);
    let mut server = Behind::of(&mut session);
    server.turns(&mut session, 3, true);
    assert!(session.relay.waits_for_rings() && !server.has_heard_of_the_stop());
    // Not if the program is exchanged meanwhile, either.
    let mut session = packed(session);
    wait(&mut server, &mut session);
    assert!(server.has_heard_of_the_stop() && !session.relay.is_held());
}

#[test]
fn a_ring_that_no_server_has_looked_at_is_stopped_at_once() {
    let (mut session, _frontend) = stopped_without_a_server(true, 0);
    let mut server = Behind::of(&mut session);
    server.turns(&mut session, 3, true);
    assert!(server.has_heard_of_the_stop() && !session.relay.is_held());
}
