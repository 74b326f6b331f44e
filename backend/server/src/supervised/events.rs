//! What has happened to the device, told to the supervisor, which numbers it, keeps it and tells
//! those who watch.
//!
//! It is told without waiting, by the thread to which it happens. Where there is no room, a thread
//! tells it when there is some: nothing is left out, and nothing changes its place.

use crate::sync::lock;
use channel::{Channel, ToSupervisor};
use proxy::DomainProxy;
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::Value;
use std::io;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Tells the supervisor.
pub(super) struct EventSender {
    channel: Arc<Channel>,
    proxy: Weak<DomainProxy>,
    sent: Mutex<Sent>,
}

#[derive(Default)]
struct Sent {
    /// The number of the last event that was.
    last: u64,
    /// A thread waits for room.
    is_awaited: bool,
}

impl EventSender {
    /// Tells all that happens from now on.
    pub(super) fn start(channel: &Arc<Channel>, proxy: &Arc<DomainProxy>) {
        let sent = Mutex::new(Sent { last: proxy.last_event(), is_awaited: false });
        let (channel, weak) = (Arc::clone(channel), Arc::downgrade(proxy));
        let sender = Arc::new(Self { channel, proxy: weak, sent });
        proxy.on_event(move || sender.send());
    }

    /// Tells what was not told yet, as far as there is room.
    fn send(self: &Arc<Self>) {
        let Some(proxy) = self.proxy.upgrade() else { return };
        let mut sent = lock(&self.sent);
        if sent.is_awaited {
            return;
        }
        while let Some((number, event)) = proxy.next_event(sent.last, Duration::ZERO) {
            let mut event = serde_json::to_value(&event).expect("an event is JSON");
            if let Some(members) = event.as_object_mut() {
                members.entry("time_ms").or_insert_with(time_ms);
            }
            match self.channel.try_send(&ToSupervisor::Happened { event }, &[]) {
                Ok(true) => sent.last = number,
                Ok(false) => {
                    sent.is_awaited = self.wait_for_room().is_ok();
                    return;
                }
                Err(error) => {
                    log::debug!("the supervisor is not told what has happened: {error}");
                    sent.last = number;
                }
            }
        }
    }

    fn wait_for_room(self: &Arc<Self>) -> io::Result<()> {
        let sender = Arc::clone(self);
        let wait = move || {
            let _ = poll(&mut [PollFd::new(&*sender.channel, PollFlags::OUT)], None);
            lock(&sender.sent).is_awaited = false;
            sender.send();
        };
        std::thread::Builder::new().name("events".to_owned()).spawn(wait).map(drop)
    }
}

/// Milliseconds since 1970.
fn time_ms() -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX).into()
}
