//! One client that asks for the page by HTTP/1.1: a state machine that never waits.
//!
//! It is as little of a server as there can be: one request, one answer, and the connection ends.
//! What a client may send is bounded, and how long it may take for that and for reading its answer,
//! so that one that is slow or hostile holds one place for a moment.

use crate::page::Format;
use httparse::{EMPTY_HEADER, Error, Request, Status};
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

/// Most bytes of a request.
pub const MOST_BYTES: usize = 8 << 10;
/// Most headers of a request.
const MOST_HEADERS: usize = 32;
/// How long a client may take, from when it has connected.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// What a client is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It has not asked yet.
    Hear,
    /// It has asked for the page, which is to be [said](Connection::say).
    Asked(Format),
    /// It has not taken all of its answer.
    Send,
    /// Nothing: it is done.
    Over,
}

/// A client.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    heard: Vec<u8>,
    /// What is to be sent, once there is an answer.
    answer: Option<Vec<u8>>,
    sent: usize,
    /// Only the head of the answer is wanted.
    wants_head: bool,
    deadline: Instant,
}

/// What a client wants.
enum Wanted {
    /// It has not said all of it.
    More,
    Page(Format),
    Refusal(&'static str),
}

impl<S> Connection<S> {
    /// A client that has connected now. Its stream must not wait.
    pub fn new(stream: S) -> Self {
        let deadline = Instant::now() + PATIENCE;
        Self { stream, heard: Vec::new(), answer: None, sent: 0, wants_head: false, deadline }
    }

    /// Its stream.
    pub const fn stream(&self) -> &S {
        &self.stream
    }

    /// When it is cut off.
    pub const fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether it has asked, and is answered.
    pub const fn is_answered(&self) -> bool {
        self.answer.is_some()
    }

    fn wanted(&mut self) -> Wanted {
        let mut headers = [EMPTY_HEADER; MOST_HEADERS];
        let mut request = Request::new(&mut headers);
        match request.parse(&self.heard) {
            Ok(Status::Complete(_)) => {}
            Ok(Status::Partial) if self.heard.len() >= MOST_BYTES => {
                return Wanted::Refusal("431 Request Header Fields Too Large");
            }
            Ok(Status::Partial) => return Wanted::More,
            Err(Error::TooManyHeaders) => {
                return Wanted::Refusal("431 Request Header Fields Too Large");
            }
            Err(_) => return Wanted::Refusal("400 Bad Request"),
        }
        let path = request.path.and_then(|target| target.split('?').next());
        match (request.method, path) {
            (Some("GET" | "HEAD"), Some("/" | "/metrics")) => {
                self.wants_head = request.method == Some("HEAD");
                let accept =
                    |header: &&httparse::Header<'_>| header.name.eq_ignore_ascii_case("accept");
                let accept = request.headers.iter().filter(accept);
                let formats =
                    accept.map(|header| Format::accepted(&String::from_utf8_lossy(header.value)));
                Wanted::Page(formats.max_by_key(|it| *it != Format::Plain).unwrap_or_default())
            }
            (Some("GET" | "HEAD"), _) => Wanted::Refusal("404 Not Found"),
            _ => Wanted::Refusal("405 Method Not Allowed"),
        }
    }

    fn answer(&mut self, status: &str, content_type: &str, body: &str) {
        let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
        let mut answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\
             {allow}Connection: close\r\n\r\n",
            body.len()
        );
        if !self.wants_head {
            answer += body;
        }
        self.answer = Some(answer.into_bytes());
    }

    /// The page that it has asked for.
    pub fn say(&mut self, format: Format, page: &str) {
        self.answer("200 OK", format.content_type(), page);
    }
}

impl<S: Read + Write> Connection<S> {
    /// Goes on as far as it can without waiting.
    ///
    /// # Errors
    /// The client is gone, or its time is over.
    pub fn advance(&mut self) -> io::Result<Step> {
        if self.deadline <= Instant::now() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if self.answer.is_none() {
            let more = self.hear()?;
            match self.wanted() {
                Wanted::More if more => return Ok(Step::Hear),
                // It has ended its side amid its request.
                Wanted::More => return Ok(Step::Over),
                Wanted::Page(format) => return Ok(Step::Asked(format)),
                Wanted::Refusal(status) => {
                    self.answer(status, "text/plain; charset=utf-8", &format!("{status}\n"));
                }
            }
        }
        self.send()
    }

    /// `false` if nothing more will come.
    fn hear(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 2048];
        while self.heard.len() < MOST_BYTES {
            match self.stream.read(&mut bytes) {
                Ok(0) => return Ok(false),
                Ok(read) => self.heard.extend_from_slice(&bytes[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn send(&mut self) -> io::Result<Step> {
        let answer = self.answer.as_deref().unwrap_or_default();
        while self.sent < answer.len() {
            match self.stream.write(&answer[self.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Step::Send),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Step::Over)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, Connection<UnixStream>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (ours, Connection::new(theirs))
    }

    /// What a client is told that says this at once.
    fn told(request: &[u8]) -> String {
        let (mut client, mut connection) = pair();
        client.write_all(request).unwrap();
        let mut step = connection.advance().unwrap();
        if let Step::Asked(format) = step {
            connection.say(format, "the page\n");
            step = connection.advance().unwrap();
        }
        assert_eq!(step, Step::Over);
        drop(connection);
        let mut answer = String::new();
        // What it has sent beyond its request may be the end of the connection.
        let _ = client.read_to_string(&mut answer);
        answer
    }

    #[test]
    fn the_page_is_given_in_the_format_that_is_asked_for() {
        for (accept, kind) in [
            ("", "text/plain; version=0.0.4"),
            ("Accept: text/plain\r\n", "text/plain; version=0.0.4"),
            (
                "accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n",
                "application/openmetrics-text; version=1.0.0",
            ),
        ] {
            let answer =
                told(format!("GET /metrics HTTP/1.1\r\nHost: x\r\n{accept}\r\n").as_bytes());
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            assert!(answer.contains(&format!("\r\nContent-Type: {kind}")), "{answer}");
            assert!(answer.contains("\r\nContent-Length: 9\r\n"), "{answer}");
            assert!(answer.ends_with("\r\n\r\nthe page\n"), "{answer}");
        }
        let head = told(b"HEAD /metrics?x=1 HTTP/1.0\r\n\r\n");
        assert!(head.contains("Content-Length: 9") && head.ends_with("\r\n\r\n"), "{head}");
    }

    #[test]
    fn what_is_no_request_for_it_is_refused() {
        let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n", "x".repeat(MOST_BYTES));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MOST_HEADERS + 1));
        for (request, status) in [
            ("GET /else HTTP/1.1\r\n\r\n", "404 "),
            ("POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "405 "),
            ("hello\r\n\r\n", "400 "),
            ("GET /metrics HTTP/3.0\r\n\r\n", "400 "),
            ("\u{16}\u{3}\u{1}\0\u{5}", "400 "),
            (&long, "431 "),
            (&many, "431 "),
        ] {
            let answer = told(request.as_bytes());
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request:?}: {answer}");
        }
    }

    #[test]
    fn a_request_may_come_in_pieces_and_one_that_ends_amid_it_is_none() {
        let (mut client, mut connection) = pair();
        for piece in ["GET /met", "rics HTTP/1.1\r", "\nHost: x\r\n"] {
            client.write_all(piece.as_bytes()).unwrap();
            assert_eq!(connection.advance().unwrap(), Step::Hear);
        }
        client.write_all(b"\r\n").unwrap();
        assert_eq!(connection.advance().unwrap(), Step::Asked(Format::Plain));
        let (client, mut connection) = pair();
        (&client).write_all(b"GET / HTTP/1.1\r\nHost").unwrap();
        drop(client);
        assert!(matches!(connection.advance(), Ok(Step::Over) | Err(_)));
    }

    #[test]
    fn a_client_that_does_not_read_is_cut_off() {
        let (mut client, mut connection) = pair();
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(connection.advance().unwrap(), Step::Asked(Format::Plain));
        connection.say(Format::Plain, &"x".repeat(16 << 20));
        assert_eq!(connection.advance().unwrap(), Step::Send);
        connection.deadline = Instant::now();
        assert_eq!(connection.advance().unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
