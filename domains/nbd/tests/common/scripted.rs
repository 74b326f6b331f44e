//! Servers that answer each request as a test says, and the protocol as they speak it.

use domain_api::Params;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;

pub const SIZE: u64 = 1 << 20;
pub const REPLY: u32 = 0x6744_6698;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const FLUSH: u16 = 3;

/// Flags of an export: there are flags; it has FLUSH; several connections are one.
pub const FLAGS: u16 = 1;
pub const CAN_FLUSH: u16 = 1 << 2;
pub const MULTI_CONN: u16 = 1 << 8;

/// Greets, and agrees on an export of [`SIZE`] bytes with these flags.
pub fn greet(stream: &mut UnixStream, flags: u16) -> io::Result<()> {
    greet_with(stream, flags, SIZE)
}

/// The same, of any size.
pub fn greet_with(stream: &mut UnixStream, flags: u16, size: u64) -> io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    let mut asked = [0; 4 + 16];
    stream.read_exact(&mut asked)?;
    let len = u32::from_be_bytes(asked[16..].try_into().unwrap());
    stream.read_exact(&mut vec![0; len as usize])?;
    let mut says = Vec::new();
    let export = [&0u16.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
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
pub fn request(stream: &mut UnixStream) -> io::Result<(u16, u64, u32)> {
    let mut header = [0; 28];
    stream.read_exact(&mut header)?;
    let kind = u16::from_be_bytes([header[6], header[7]]);
    let cookie = u64::from_be_bytes(header[8..16].try_into().unwrap());
    let len = u32::from_be_bytes(header[24..].try_into().unwrap());
    if kind == WRITE {
        // In small pieces: more slowly than a client sends.
        let mut left = len as usize;
        let mut piece = [0; 1024];
        while left > 0 {
            let next = left.min(piece.len());
            stream.read_exact(&mut piece[..next])?;
            left -= next;
        }
    }
    Ok((kind, cookie, len))
}

pub fn reply(cookie: u64, error: u32) -> Vec<u8> {
    [&REPLY.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
}

/// What becomes of a request.
pub enum Answer {
    /// It goes well; what is read are sevens.
    Good,
    Error(u32),
    /// The connection is closed instead.
    Close,
    /// It goes well, but not before this is set.
    Held(Arc<AtomicBool>),
    /// It goes well, and these bytes follow before the connection is closed.
    GoodAnd(&'static [u8]),
}

/// A server that answers as a test says, each connection by a thread of its own.
pub struct Scripted {
    folder: TempDir,
    /// How many have connected.
    pub connections: Arc<AtomicUsize>,
    /// How many of them are not greeted: those that come later than so many.
    pub greets: Arc<AtomicUsize>,
    /// What those are told that are greeted from now on.
    pub size: Arc<Mutex<u64>>,
}

impl Scripted {
    /// `answer` gets the number of the connection, from 0, and the kind of the request.
    pub fn new(flags: u16, answer: impl Fn(usize, u16) -> Answer + Send + Sync + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let greets = Arc::new(AtomicUsize::new(usize::MAX));
        let size = Arc::new(Mutex::new(SIZE));
        let (count, most, told) =
            (Arc::clone(&connections), Arc::clone(&greets), Arc::clone(&size));
        let answer = Arc::new(answer);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let number = count.fetch_add(1, Ordering::SeqCst);
                let (answer, told) = (Arc::clone(&answer), Arc::clone(&told));
                let is_greeted = number < most.load(Ordering::SeqCst);
                std::thread::spawn(move || {
                    if !is_greeted {
                        // Until the client goes.
                        let _ = stream.read(&mut [0]);
                        return;
                    }
                    let size = *told.lock().unwrap();
                    if greet_with(&mut stream, flags, size).is_ok() {
                        // It ends with its connection.
                        let _ = serve(stream, |kind| answer(number, kind));
                    }
                });
            }
        });
        Self { folder, connections, greets, size }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    pub fn params(&self, more: &[&str]) -> Params {
        let mut params = Params::from_pairs(more).unwrap();
        params.set("uri", format!("nbd+unix:///?socket={}", self.socket().display()));
        params
    }
}

fn serve(mut stream: UnixStream, answer: impl Fn(u16) -> Answer) -> io::Result<()> {
    // Answers may come from several threads.
    let writer = Arc::new(Mutex::new(stream.try_clone()?));
    loop {
        let (kind, cookie, len) = request(&mut stream)?;
        let good = move || {
            let mut says = reply(cookie, 0);
            if kind == READ {
                says.resize(16 + len as usize, 7);
            }
            says
        };
        let says = match answer(kind) {
            Answer::Good => good(),
            Answer::Error(error) => reply(cookie, error),
            Answer::Close => return stream.shutdown(std::net::Shutdown::Both),
            Answer::GoodAnd(more) => {
                writer.lock().unwrap().write_all(&[&good(), more].concat())?;
                return stream.shutdown(std::net::Shutdown::Both);
            }
            Answer::Held(is_free) => {
                let writer = Arc::clone(&writer);
                std::thread::spawn(move || {
                    while !is_free.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    let _ = writer.lock().unwrap().write_all(&good());
                });
                continue;
            }
        };
        writer.lock().unwrap().write_all(&says)?;
    }
}
