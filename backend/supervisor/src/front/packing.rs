//! The control front as a state that the next program of the process goes on with.

use super::client::{Client, PackedClient};
use super::shared::{Server, Shared};
use super::{Facts, Front, PATIENCE};
use crate::said::Said as SaidBefore;
use crate::slots::{Missing, Packing, Slot, Unpacking};
use control::{Commanders, KeptName, Limits, SocketFile};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use telemetry::{Book, book};

/// A [`Front`] in a packed state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PackedFront {
    listener: Slot,
    name: KeptName,
    clients: BTreeMap<u64, PackedClient>,
    next_client: u64,
    server: Server,
    facts: Option<Facts>,
    last_status: Option<Value>,
    next_ticket: u64,
    last_event: u64,
    events_before: u64,
    #[serde(default)]
    book: book::Packed,
    #[serde(default)]
    book_directory: Option<Slot>,
    #[serde(default)]
    tells_events: bool,
    /// Servers' processes, present and former.
    #[serde(default)]
    servers: Vec<u32>,
}

impl Front {
    /// Packs everything for the next program. The loop has done all [`wishes`](Self::wishes)
    /// before.
    pub fn pack<'a>(&'a self, packing: &mut Packing<'a>) -> PackedFront {
        PackedFront {
            listener: packing.put(self.socket.listener().as_fd()),
            name: self.socket.keep(),
            clients: self.clients.iter().map(|(&number, it)| (number, it.pack(packing))).collect(),
            next_client: self.next_client,
            server: self.shared.server,
            facts: self.shared.facts.clone(),
            last_status: self.shared.last_status.clone(),
            next_ticket: self.shared.next_ticket,
            last_event: self.shared.last_event,
            events_before: self.shared.events_before,
            book: self.shared.book.pack(),
            book_directory: self.shared.book.directory().map(|fd| packing.put(fd)),
            tells_events: self.shared.tells_events,
            servers: self.servers.iter().chain(&self.former).copied().collect(),
        }
    }

    /// Goes on with what another program has packed.
    ///
    /// # Errors
    /// A descriptor is missing.
    pub fn unpack(
        packed: PackedFront,
        limits: Limits,
        unpacking: &mut Unpacking,
    ) -> Result<Self, Missing> {
        let listener = unpacking.take(packed.listener)?;
        let directory = packed.book_directory.map(|slot| unpacking.take(slot)).transpose()?;
        let book = Book::unpack(packed.book, directory);
        let clients = packed.clients.into_iter().map(|(number, client)| {
            Client::unpack(client, &limits, unpacking).map(|client| (number, client))
        });
        Ok(Self {
            clients: clients.collect::<Result<_, _>>()?,
            socket: SocketFile::resume(packed.name, listener),
            commanders: Commanders::of_this_process(),
            servers: packed.servers,
            former: Vec::new(),
            next_client: packed.next_client,
            shared: Shared {
                limits,
                patience: PATIENCE,
                server: packed.server,
                facts: packed.facts,
                last_status: packed.last_status,
                is_stale: false,
                wishes: Vec::new(),
                next_ticket: packed.next_ticket,
                last_event: packed.last_event,
                events_before: packed.events_before,
                book,
                tells_events: packed.tells_events,
            },
            observer: None,
            accept_again: None,
            said: SaidBefore::default(),
        })
    }
}
