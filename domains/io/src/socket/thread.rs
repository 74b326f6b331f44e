//! A thread that waits for sockets, where the kernel cannot be asked to write to an eventfd.

use super::{News, Task};
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The name of what ends the thread: of no socket, whose names are 32 bits.
const END: u64 = u64::MAX;
/// Events that are taken at once.
const AT_ONCE: usize = 16;

/// As [`Watch`](super::Watch) says.
#[derive(Debug)]
pub(super) struct Thread(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    epoll: OwnedFd,
    /// The worker's eventfd.
    wake: OwnedFd,
    /// Written to when the thread is to end.
    end: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    sockets: Vec<Socket>,
    news: Vec<News>,
}

/// A socket that is watched, by a descriptor of its own: another one's number could come to mean
/// another file.
#[derive(Debug)]
struct Socket {
    name: u32,
    descriptor: OwnedFd,
    reads: bool,
    writes: bool,
}

impl Thread {
    pub(super) fn begin<E: std::fmt::Display>(
        wake: OwnedFd,
        spawn: impl FnOnce(Task) -> Result<(), E>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let end = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        epoll::add(&epoll, &end, EventData::new_u64(END), EventFlags::IN)?;
        let shared = Arc::new(Shared { epoll, wake, end, state: Mutex::default() });
        let its = Arc::clone(&shared);
        spawn(Box::new(move || its.run())).map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Self(shared))
    }

    pub(super) fn reading(&mut self, name: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.0.watch(name, socket, |socket| socket.reads = true)
    }

    pub(super) fn writing(&mut self, name: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.0.watch(name, socket, |socket| socket.writes = true)
    }

    pub(super) fn forget(&mut self, name: u32) {
        let mut state = self.0.state();
        if let Some(at) = state.sockets.iter().position(|socket| socket.name == name) {
            let socket = state.sockets.swap_remove(at);
            // It cannot fail for one that is there; and it would end with the descriptor.
            let _ = epoll::delete(&self.0.epoll, &socket.descriptor);
        }
        state.news.retain(
            |news| !matches!(news, News::Unwatched(of) | News::Writable(of) if *of == name),
        );
    }

    pub(super) fn take(&mut self) -> Option<News> {
        self.0.state().news.pop()
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        signal(&self.0.end);
    }
}

impl Shared {
    /// Nothing that holds the lock can panic half-way.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says of what is there already, too.
    fn watch(
        &self,
        name: u32,
        socket: BorrowedFd<'_>,
        change: impl FnOnce(&mut Socket),
    ) -> io::Result<()> {
        let mut state = self.state();
        if let Some(socket) = state.sockets.iter_mut().find(|socket| socket.name == name) {
            change(socket);
            let (data, events) = (EventData::new_u64(name.into()), socket.events());
            return Ok(epoll::modify(&self.epoll, &socket.descriptor, data, events)?);
        }
        let descriptor = socket.try_clone_to_owned()?;
        let mut socket = Socket { name, descriptor, reads: false, writes: false };
        change(&mut socket);
        let (data, events) = (EventData::new_u64(name.into()), socket.events());
        epoll::add(&self.epoll, &socket.descriptor, data, events)?;
        state.sockets.push(socket);
        Ok(())
    }

    fn run(&self) {
        let mut events =
            [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; AT_ONCE];
        loop {
            let came = match epoll::wait(&self.epoll, &mut events, None) {
                Ok(came) => came,
                Err(rustix::io::Errno::INTR) => continue,
                // Only what is no epoll could bring that about.
                Err(_) => return,
            };
            let mut state = self.state();
            for event in &events[..came] {
                let Event { flags, data } = *event;
                if data.u64() == END {
                    return;
                }
                self.came(&mut state, data.u64() as u32, flags);
            }
            drop(state);
            signal(&self.wake);
        }
    }

    fn came(&self, state: &mut State, name: u32, flags: EventFlags) {
        let State { sockets, news } = state;
        let socket = sockets.iter_mut().find(|socket| socket.name == name && socket.writes);
        let Some(socket) = socket else { return };
        // Of one that is broken writing says so.
        if flags.intersects(EventFlags::OUT | EventFlags::ERR | EventFlags::HUP) {
            socket.writes = false;
            news.push(News::Writable(name));
            let (data, events) = (EventData::new_u64(name.into()), socket.events());
            // As in `forget`.
            let _ = epoll::modify(&self.epoll, &socket.descriptor, data, events);
        }
    }
}

impl Socket {
    /// Once for each time that something comes.
    fn events(&self) -> EventFlags {
        let mut events = EventFlags::ET;
        events.set(EventFlags::IN | EventFlags::RDHUP, self.reads);
        events.set(EventFlags::OUT, self.writes);
        events
    }
}

/// Adds one to an eventfd; one that is full is read soon.
fn signal(eventfd: &OwnedFd) {
    let _ = rustix::io::write(eventfd, &1_u64.to_ne_bytes());
}
