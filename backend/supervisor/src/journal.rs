//! What made a session what it is, and the messages that make another server's session the same.
//!
//! Each message that the server has carried out is [noted](Journal::note); what a later one undoes
//! is forgotten, so that the journal does not grow with the session. [`Journal::replay`] gives the
//! messages for a new server, in the order in which frontends send them.

use crate::descriptor::Descriptor;
use crate::request;
use crate::wire::Message;
use rustix::fs::fstat;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Bytes of a memory region in a message: guest address, size, user address, offset.
const REGION: usize = 32;
/// Most regions that go into one table; more are added one by one.
const TABLE: usize = 8;
/// In the body of a message that brings a ring's descriptor: there is none.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// A part of the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Region {
    guest: u64,
    size: u64,
    user: u64,
    offset: u64,
    file: Descriptor,
}

impl Region {
    fn read(bytes: &[u8], file: &Descriptor) -> Option<Self> {
        let word =
            |at: usize| Some(u64::from_le_bytes(bytes.get(at * 8..at * 8 + 8)?.try_into().ok()?));
        let (guest, size, user, offset) = (word(0)?, word(1)?, word(2)?, word(3)?);
        Some(Self { guest, size, user, offset, file: file.clone() })
    }

    fn bytes(&self) -> Vec<u8> {
        [self.guest, self.size, self.user, self.offset]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    const fn has(&self, user: u64) -> bool {
        user >= self.user && user - self.user < self.size
    }
}

/// What a ring was told.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Ring {
    num: Option<Message>,
    base: Option<u32>,
    addr: Option<Message>,
    error: Option<Message>,
    call: Option<Message>,
    kick: Option<Message>,
    is_enabled: Option<bool>,
}

/// A session's state, as far as a frontend has made it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Journal {
    has_owner: bool,
    features: Option<u64>,
    /// What was written to the configuration space, by place and length.
    #[serde(with = "pairs")]
    config: BTreeMap<(u32, u32), Message>,
    memory: Vec<Region>,
    log: Option<Message>,
    rings: BTreeMap<u32, Ring>,
}

impl Journal {
    /// Notes a message that was carried out. `answer` is the server's, if the message has one.
    pub fn note(&mut self, message: &Message, answer: Option<&Message>) {
        // What cannot be read was not carried out, so that there is nothing to note.
        let _ = self.try_note(message, answer);
    }

    fn ring(&mut self, message: &Message) -> Option<&mut Ring> {
        let index = match message.request {
            request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR => {
                message.u64_at(0)? as u32 & 0xff
            }
            _ => message.u32_at(0)?,
        };
        Some(self.rings.entry(index).or_default())
    }

    fn try_note(&mut self, message: &Message, answer: Option<&Message>) -> Option<()> {
        let plain = || Message::new(message.request, &message.body[..], message.files.clone());
        match message.request {
            request::SET_OWNER => self.has_owner = true,
            request::RESET_OWNER => (self.has_owner, self.features) = (false, None),
            request::SET_FEATURES => {
                let features = message.u64_at(0)?;
                let was_logged = self.features.is_none_or(|bits| bits & request::F_LOG_ALL != 0);
                if was_logged && features & request::F_LOG_ALL == 0 {
                    // The migration is over. The guest's memory may outgrow its log.
                    self.log = None;
                }
                self.features = Some(features);
            }
            request::SET_CONFIG => {
                let place = (message.u32_at(0)?, message.u32_at(4)?);
                self.config.insert(place, plain());
            }
            request::SET_MEM_TABLE => {
                let regions = message.body.get(8..)?.chunks_exact(REGION);
                let regions = regions.zip(&message.files);
                self.memory = regions
                    .map(|(bytes, file)| Region::read(bytes, file))
                    .collect::<Option<_>>()?;
            }
            request::ADD_MEM_REG => {
                self.memory.push(Region::read(message.body.get(8..)?, message.files.first()?)?);
            }
            request::REM_MEM_REG => {
                let (guest, size) = (message.u64_at(8)?, message.u64_at(16)?);
                self.memory.retain(|region| (region.guest, region.size) != (guest, size));
            }
            request::SET_LOG_BASE => self.log = Some(plain()),
            request::SET_VRING_NUM => self.ring(message)?.num = Some(plain()),
            request::SET_VRING_ADDR => self.ring(message)?.addr = Some(plain()),
            request::SET_VRING_BASE => self.ring(message)?.base = Some(message.u32_at(4)?),
            request::SET_VRING_ERR => self.ring(message)?.error = Some(plain()),
            request::SET_VRING_CALL => self.ring(message)?.call = Some(plain()),
            request::SET_VRING_KICK => self.ring(message)?.kick = Some(plain()),
            request::SET_VRING_ENABLE => {
                self.ring(message)?.is_enabled = Some(message.u32_at(4)? != 0);
            }
            request::GET_VRING_BASE => {
                let base = answer?.u32_at(4)?;
                let ring = self.ring(message)?;
                (ring.kick, ring.call, ring.base) = (None, None, Some(base));
            }
            request::RESET_DEVICE => {
                self.features = None;
                self.config.clear();
                self.rings.values_mut().for_each(|ring| ring.is_enabled = None);
            }
            _ => {}
        }
        Some(())
    }

    /// The messages that make a new server's session the same, after those that negotiate what the
    /// protocol can do.
    #[must_use]
    pub fn replay(&self) -> Vec<Message> {
        let mut messages = Vec::new();
        if self.has_owner {
            messages.push(Message::new(request::SET_OWNER, [], Vec::new()));
        }
        if let Some(features) = self.features {
            messages.push(u64_message(request::SET_FEATURES, features));
        }
        messages.extend(self.config.values().cloned());
        self.replay_memory(&mut messages);
        for (&index, ring) in &self.rings {
            messages.extend(ring.num.clone());
            let base = ring.base.map(|base| state_message(request::SET_VRING_BASE, index, base));
            messages.extend(base);
            // A ring that was stopped may have been where no memory is any more.
            let is_there = ring.kick.is_some() || self.has_memory(ring);
            messages.extend(ring.addr.clone().filter(|_| is_there));
            messages.extend([&ring.error, &ring.call, &ring.kick].into_iter().flatten().cloned());
        }
        messages.extend(self.log.clone());
        // Without this feature rings are on from the beginning, and cannot be turned.
        if self.features.is_some_and(|bits| bits & request::F_PROTOCOL_FEATURES != 0) {
            for (&index, ring) in &self.rings {
                let turn =
                    |on: bool| state_message(request::SET_VRING_ENABLE, index, u32::from(on));
                messages.extend(ring.is_enabled.map(turn));
            }
        }
        messages
    }

    fn replay_memory(&self, messages: &mut Vec<Message>) {
        let mut regions: Vec<&Region> = self.memory.iter().collect();
        // The server takes a table in this order only.
        regions.sort_by_key(|region| region.guest);
        let (table, more) = regions.split_at(regions.len().min(TABLE));
        if !table.is_empty() {
            let mut body = (table.len() as u64).to_le_bytes().to_vec();
            table.iter().for_each(|region| body.extend(region.bytes()));
            let files = table.iter().map(|region| region.file.clone()).collect();
            messages.push(Message::new(request::SET_MEM_TABLE, body, files));
        }
        for region in more {
            let body = [&[0; 8][..], &region.bytes()].concat();
            messages.push(Message::new(request::ADD_MEM_REG, body, vec![region.file.clone()]));
        }
    }

    /// Whether there is memory where the parts of a ring begin.
    fn has_memory(&self, ring: &Ring) -> bool {
        let Some(addr) = &ring.addr else { return false };
        // Index and flags come first, the log's address last.
        [8, 16, 24].into_iter().all(|at| {
            addr.u64_at(at).is_some_and(|user| self.memory.iter().any(|region| region.has(user)))
        })
    }

    /// Whether there is memory where the parts of a queue's ring begin.
    #[must_use]
    pub fn has_ring(&self, queue: u32) -> bool {
        self.rings.get(&queue).is_some_and(|ring| self.has_memory(ring))
    }

    /// Where a ring that does not run is to begin, or has stopped.
    #[must_use]
    pub fn base(&self, queue: u32) -> u32 {
        self.rings.get(&queue).and_then(|ring| ring.base).unwrap_or(0)
    }

    /// How the rings are kicked that have started.
    #[must_use]
    pub fn kicks(&self) -> Vec<Descriptor> {
        let kicks = self.rings.values().filter_map(|ring| ring.kick.as_ref());
        kicks.filter_map(|kick| kick.files.first().cloned()).collect()
    }

    /// The rings that serve their driver.
    #[must_use]
    pub fn running(&self) -> Vec<u32> {
        let always = self.features.is_some_and(|bits| bits & request::F_PROTOCOL_FEATURES == 0);
        let is_on = |ring: &Ring| ring.kick.is_some() && (always || ring.is_enabled == Some(true));
        self.rings.iter().filter(|(_, ring)| is_on(ring)).map(|(&index, _)| index).collect()
    }

    /// Whether a message gives a ring that runs another size than it has, which it keeps. `largest`
    /// is that of one which was given none.
    #[must_use]
    pub fn is_other_size(&self, message: &Message, largest: u16) -> bool {
        if message.request != request::SET_VRING_NUM {
            return false;
        }
        let runs = |queue: &u32| self.running().contains(queue);
        let Some(queue) = message.u32_at(0).filter(runs) else { return false };
        let num = self.rings.get(&queue).and_then(|ring| ring.num.as_ref());
        let size = num.and_then(|num| num.u32_at(4)).unwrap_or_else(|| largest.into());
        message.u32_at(4) != Some(size)
    }

    /// Memory regions that a table in a message has, if they overlap each other.
    #[must_use]
    pub fn has_overlap(message: &Message) -> bool {
        let Some(bytes) = message.body.get(8..) else { return false };
        let word = |chunk: &[u8], at: usize| {
            u64::from_le_bytes(chunk[at..at + 8].try_into().unwrap_or_default())
        };
        let mut ranges: Vec<(u64, u64)> =
            bytes.chunks_exact(REGION).map(|chunk| (word(chunk, 0), word(chunk, 8))).collect();
        ranges.sort_unstable();
        ranges.windows(2).any(|pair| pair[0].0.saturating_add(pair[0].1) > pair[1].0)
    }
}

/// JSON has no keys but strings.
mod pairs {
    use super::{BTreeMap, Message};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    type Map = BTreeMap<(u32, u32), Message>;

    pub(super) fn serialize<S: Serializer>(map: &Map, serializer: S) -> Result<S::Ok, S::Error> {
        map.iter().collect::<Vec<_>>().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Map, D::Error> {
        Vec::deserialize(deserializer).map(|pairs| pairs.into_iter().collect())
    }
}

/// Brings a table of memory regions into the order that servers take it in.
pub fn sort_table(message: &mut Message) {
    let Some(bytes) = message.body.get(8..) else { return };
    if bytes.len() != message.files.len() * REGION {
        return;
    }
    let guest = |chunk: &[u8]| u64::from_le_bytes(chunk[..8].try_into().unwrap_or_default());
    let mut regions: Vec<(Vec<u8>, Descriptor)> =
        bytes.chunks_exact(REGION).map(<[u8]>::to_vec).zip(message.files.drain(..)).collect();
    regions.sort_by_key(|(bytes, _)| guest(bytes));
    message.body.truncate(8);
    for (bytes, file) in regions {
        message.body.extend(bytes);
        message.files.push(file);
    }
}

/// Whether the file of a migration's log has what the message says: whoever marks in it behind its
/// end is ended by a signal.
///
/// # Errors
/// It has not, for this reason.
pub fn log_is_there(message: &Message) -> Result<(), String> {
    if message.request != request::SET_LOG_BASE {
        return Ok(());
    }
    let place = message.u64_at(0).zip(message.u64_at(8)).zip(message.files.first());
    let ((len, offset), file) = place.ok_or("there is none in the message")?;
    let stat = fstat(file).map_err(|error| format!("it cannot be looked at: {error}"))?;
    let has_it = offset.checked_add(len).is_some_and(|end| end <= stat.st_size as u64);
    let ends = || format!("it ends at {offset} + {len}, and its file at {}", stat.st_size);
    if has_it { Ok(()) } else { Err(ends()) }
}

/// A message whose body is one number.
pub fn u64_message(request: u32, value: u64) -> Message {
    Message::new(request, value.to_le_bytes(), Vec::new())
}

/// A message about a ring whose body is a number and another.
pub fn state_message(request: u32, index: u32, number: u32) -> Message {
    let body = [index.to_le_bytes(), number.to_le_bytes()].concat();
    Message::new(request, body, Vec::new())
}

/// A message that brings a ring's descriptor, or says that it has none.
pub fn descriptor_message(request: u32, index: u32, file: Option<Descriptor>) -> Message {
    let none = if file.is_none() { NO_DESCRIPTOR } else { 0 };
    let body = (u64::from(index) | none).to_le_bytes();
    Message::new(request, body, file.into_iter().collect())
}
