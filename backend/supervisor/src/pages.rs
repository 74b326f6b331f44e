//! Where the page of metrics is to be had: a listening socket, and the clients that ask there.
//!
//! As the control front, it never waits: the loop looks at what [`Pages::polled`] names, and calls
//! [`Pages::advance`] when something may have happened. There are few places for clients. One more
//! takes the place of the one that has not asked for longest, so that slow ones cannot keep it out.

use crate::slots::{Missing, Packing, Slot, Unpacking};
use control::{KeptName, SocketFile};
use rustix::event::PollFlags;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};
use telemetry::Address;
use telemetry::http::{Connection, Step};
use telemetry::page::Format;

/// Most clients at a time.
const PLACES: usize = 8;
/// How long to let accepting rest when the process has no descriptor left for a client.
const EXHAUSTED: Duration = Duration::from_millis(100);
/// How long a page is told again that has more bytes than the other: to make one takes long where
/// there are many queues. A shorter one is told to all that ask in a turn of the loop.
const FRESH: Duration = Duration::from_millis(100);
const LARGE: usize = if cfg!(test) { 8 << 10 } else { 256 << 10 };

/// Where clients come in.
#[derive(Debug)]
enum Listener {
    Unix(SocketFile),
    Tcp(TcpListener),
}

/// A client's stream.
#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(bytes),
            Self::Tcp(stream) => stream.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

/// The socket and its clients.
#[derive(Debug)]
pub struct Pages {
    listener: Listener,
    clients: Vec<(Connection<Stream>, Step)>,
    /// Accepting rests until then.
    accept_again: Option<Instant>,
    /// Pages, and when they were made.
    made: Vec<(Format, Instant, Rc<str>)>,
}

/// [`Pages`] in a packed state. Clients come again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PackedPages {
    listener: Slot,
    /// Of a Unix socket.
    name: Option<KeptName>,
}

impl Pages {
    /// Listens there.
    ///
    /// # Errors
    /// In a sentence: it cannot.
    pub fn listen(address: &Address) -> Result<Self, String> {
        let pages = match address {
            Address::Path(path) => {
                let socket = SocketFile::listen(path, 0o600).map_err(|error| error.to_string())?;
                socket.listener().set_nonblocking(true).map(|()| Self::of(Listener::Unix(socket)))
            }
            Address::Loopback(address) => TcpListener::bind(address).and_then(|listener| {
                listener.set_nonblocking(true)?;
                log::info!("metrics at http://{}/metrics", listener.local_addr()?);
                Ok(Self::of(Listener::Tcp(listener)))
            }),
        };
        pages.map_err(|error| format!("cannot listen for metrics on {address}: {error}"))
    }

    const fn of(listener: Listener) -> Self {
        Self { listener, clients: Vec::new(), accept_again: None, made: Vec::new() }
    }

    /// What is looked at, and for what.
    pub fn polled(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        let clients = self.clients.iter().map(|(client, step)| {
            let interest = if *step == Step::Send { PollFlags::OUT } else { PollFlags::IN };
            (client.stream().as_fd(), interest)
        });
        let mut polled: Vec<_> = clients.collect();
        if self.accept_again.is_none() {
            let listener = match &self.listener {
                Listener::Unix(socket) => socket.listener().as_fd(),
                Listener::Tcp(listener) => listener.as_fd(),
            };
            polled.push((listener, PollFlags::IN));
        }
        polled
    }

    /// When to come back at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.clients.iter().map(|(client, _)| client.deadline()).chain(self.accept_again).min()
    }

    /// Goes on as far as it can without waiting; `page` makes what is asked for, unless it was made
    /// just before.
    ///
    /// Those that have a place come first, and no more are let in than there are places: the loop
    /// has more to do, however many come.
    pub fn advance(&mut self, mut page: impl FnMut(Format) -> String) {
        let now = Instant::now();
        self.accept_again = self.accept_again.filter(|again| *again > now);
        self.made.retain(|(_, made, page)| {
            page.len() > LARGE && now.saturating_duration_since(*made) < FRESH
        });
        let made = &mut self.made;
        let mut page = |format| match made.iter().find(|(of, ..)| *of == format) {
            Some((.., page)) => Rc::clone(page),
            None => {
                let page: Rc<str> = page(format).into();
                made.push((format, now, Rc::clone(&page)));
                page
            }
        };
        self.clients.retain_mut(|(client, step)| go_on(client, step, &mut page));
        for _ in 0..PLACES {
            let Some(stream) = accept(&self.listener, &mut self.accept_again) else { break };
            let (mut client, mut step) = (Connection::new(stream), Step::Hear);
            if go_on(&mut client, &mut step, &mut page) {
                make_room(&mut self.clients);
                self.clients.push((client, step));
            }
        }
    }

    /// Packs it for the next program of this process.
    pub fn pack<'a>(&'a self, packing: &mut Packing<'a>) -> PackedPages {
        match &self.listener {
            Listener::Unix(socket) => PackedPages {
                listener: packing.put(socket.listener().as_fd()),
                name: Some(socket.keep()),
            },
            Listener::Tcp(listener) => {
                PackedPages { listener: packing.put(listener.as_fd()), name: None }
            }
        }
    }

    /// Goes on with what another program of this process has packed.
    ///
    /// # Errors
    /// The descriptor is missing.
    pub fn unpack(packed: PackedPages, unpacking: &mut Unpacking) -> Result<Self, Missing> {
        let listener = unpacking.take(packed.listener)?;
        Ok(Self::of(match packed.name {
            Some(name) => Listener::Unix(SocketFile::resume(name, listener)),
            None => Listener::Tcp(listener.into()),
        }))
    }
}

/// A client goes on as far as it can. `false` if it is done with.
fn go_on(
    client: &mut Connection<Stream>,
    step: &mut Step,
    page: &mut impl FnMut(Format) -> Rc<str>,
) -> bool {
    let mut next = client.advance();
    if let Ok(Step::Asked(format)) = next {
        client.say(format, &page(format));
        next = client.advance();
    }
    match next {
        Ok(Step::Over) | Err(_) => false,
        Ok(next) => {
            *step = next;
            true
        }
    }
}

/// One that has connected, if there is one.
fn accept(listener: &Listener, again: &mut Option<Instant>) -> Option<Stream> {
    while again.is_none() {
        let stream = match listener {
            Listener::Unix(socket) => socket.listener().accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(Stream::Unix(stream))
            }),
            Listener::Tcp(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(Stream::Tcp(stream))
            }),
        };
        match stream {
            Ok(stream) => return Some(stream),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                // It is looked for again in the next turn, if there are others.
                io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted => return None,
                _ => *again = Some(Instant::now() + EXHAUSTED),
            },
        }
    }
    None
}

/// One that has asked is let go only if all have.
fn make_room(clients: &mut Vec<(Connection<Stream>, Step)>) {
    if clients.len() >= PLACES {
        let silent = clients.iter().position(|(client, _)| !client.is_answered());
        clients.remove(silent.unwrap_or(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    fn pages() -> (Pages, SocketAddr) {
        let address = "127.0.0.1:0".parse().unwrap();
        let pages = Pages::listen(&Address::Loopback(address)).unwrap();
        let Listener::Tcp(listener) = &pages.listener else { panic!("it is a port") };
        let address = listener.local_addr().unwrap();
        (pages, address)
    }

    fn ask(address: SocketAddr, request: &str) -> TcpStream {
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(request.as_bytes()).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        client
    }

    /// What a client is told while the pages go on.
    fn told(pages: &mut Pages, client: &mut TcpStream) -> String {
        let (mut bytes, end) = (Vec::new(), Instant::now() + Duration::from_secs(5));
        while Instant::now() < end {
            pages.advance(|_| "the page".to_owned());
            match client.read_to_end(&mut bytes) {
                Ok(_) => return String::from_utf8(bytes).unwrap(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}"),
            }
        }
        panic!("no answer: {bytes:?}");
    }

    const REQUEST: &str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

    #[test]
    fn slow_clients_keep_no_one_out() {
        let (mut pages, address) = pages();
        let slow: Vec<TcpStream> =
            (0..3 * PLACES).map(|_| ask(address, "GET /metrics HTTP/1.1\r\nX: ")).collect();
        pages.advance(|_| panic!("nothing was asked for"));
        assert!(pages.clients.len() <= PLACES);
        let mut client = ask(address, REQUEST);
        let answer = told(&mut pages, &mut client);
        assert!(answer.ends_with("the page"), "{answer}");
        assert!(pages.deadline().is_some_and(|end| end <= Instant::now() + Duration::from_secs(5)));
        drop(slow);
        // They are forgotten when they have gone.
        let end = Instant::now() + Duration::from_secs(5);
        while !pages.clients.is_empty() && Instant::now() < end {
            pages.advance(|_| String::new());
        }
        assert!(pages.clients.is_empty());
    }

    #[test]
    fn a_turn_ends_however_many_come() {
        let (mut pages, address) = pages();
        let silent: Vec<TcpStream> =
            (0..3 * PLACES).map(|_| TcpStream::connect(address).unwrap()).collect();
        pages.advance(|_| panic!("nothing was asked for"));
        // Those that were let in are silent; the rest waits for the next turns.
        let is_let_in = |client: &&TcpStream| {
            pages.clients.iter().any(|(ours, _)| match ours.stream() {
                Stream::Tcp(ours) => ours.peer_addr().ok() == client.local_addr().ok(),
                Stream::Unix(_) => false,
            })
        };
        let let_in: Vec<bool> = silent.iter().map(|client| is_let_in(&client)).collect();
        assert_eq!(let_in.iter().filter(|it| **it).count(), PLACES);
        assert!(let_in[..PLACES].iter().all(|it| *it), "{let_in:?}");
    }

    #[test]
    fn all_that_have_asked_are_answered_with_one_page() {
        let (mut pages, address) = pages();
        // One more than there are places.
        let mut clients: Vec<_> = (0..PLACES + 1).map(|_| ask(address, REQUEST)).collect();
        let mut made = 0;
        for _ in 0..2 {
            pages.advance(|_| {
                made += 1;
                format!("page {made}{}", " ".repeat(LARGE))
            });
        }
        for client in &mut clients {
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.contains("\r\n\r\npage 1 "), "{answer}");
        }
        assert_eq!(made, 1, "it is made for each of them");
        std::thread::sleep(FRESH);
        let mut client = ask(address, REQUEST);
        let answer = told(&mut pages, &mut client);
        assert!(answer.ends_with("the page"), "it is an old one: {answer}");
    }

    #[test]
    fn another_program_listens_at_the_same_place() {
        let (pages, address) = pages();
        let mut packing = Packing::default();
        let packed = pages.pack(&mut packing);
        let descriptors = packing.into_descriptors();
        let dup = descriptors[0].try_clone_to_owned().unwrap();
        let number = serde_json::to_value(&packed).unwrap()["listener"].as_i64().unwrap() as i32;
        drop(pages);
        let mut unpacking = Unpacking::from(std::collections::BTreeMap::from([(number, dup)]));
        let mut pages = Pages::unpack(packed, &mut unpacking).unwrap();
        let mut client = ask(address, REQUEST);
        assert!(told(&mut pages, &mut client).ends_with("the page"));
    }

    #[test]
    fn an_address_that_is_taken_is_a_sentence() {
        let (_pages, address) = pages();
        let error = Pages::listen(&Address::Loopback(address)).unwrap_err();
        assert!(error.contains("cannot listen for metrics on http://127.0.0.1:"), "{error}");
    }
}
