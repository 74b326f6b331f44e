//! A server that does to its state what `vhost-user-backend` does.

use std::collections::BTreeMap;
use supervisor::descriptor::Descriptor;
use supervisor::journal::state_message;
use supervisor::request as r;
use supervisor::wire::Message;

pub(crate) const FEATURES: u64 = 0x1_3000_7646 | r::F_PROTOCOL_FEATURES;
pub(crate) const REGION: u64 = 1 << 20;

/// What a ring of a server is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Ring {
    pub(crate) num: u32,
    pub(crate) base: u32,
    pub(crate) addr: Option<Vec<u8>>,
    pub(crate) call: Option<Descriptor>,
    pub(crate) kick: Option<Descriptor>,
    pub(crate) error: Option<Descriptor>,
    pub(crate) is_enabled: bool,
}

/// A server, as far as messages make it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Server {
    pub(crate) is_negotiated: bool,
    pub(crate) has_owner: bool,
    pub(crate) features: u64,
    pub(crate) memory: BTreeMap<u64, (Vec<u8>, Descriptor)>,
    pub(crate) cache: u8,
    pub(crate) log: Option<Vec<u8>>,
    pub(crate) rings: BTreeMap<u32, Ring>,
}

impl Server {
    /// Carries a message out; `used` is how far each ring has come. `Err` is what ends a session.
    pub(crate) fn carry_out(&mut self, message: &Message, used: &[u32]) -> Result<Message, String> {
        let request = message.request;
        let index = match request {
            r::SET_VRING_KICK | r::SET_VRING_CALL | r::SET_VRING_ERR => {
                message.u64_at(0).unwrap() as u32 & 0xff
            }
            _ => message.u32_at(0).unwrap_or(0),
        };
        let value = |value: u64| Ok(Message::reply(request, value.to_le_bytes(), Vec::new()));
        let is_on = self.features & r::F_PROTOCOL_FEATURES != 0;
        let is_negotiated = self.is_negotiated;
        let ring = |server: &mut Self| {
            let ring = server.rings.entry(index).or_default();
            std::mem::take(ring)
        };
        match request {
            r::GET_FEATURES => return value(FEATURES),
            r::GET_PROTOCOL_FEATURES => return value(r::protocol::PASSED_ON),
            r::SET_PROTOCOL_FEATURES => self.is_negotiated = true,
            r::GET_QUEUE_NUM => return value(2),
            r::GET_MAX_MEM_SLOTS => return value(509),
            r::SET_OWNER if self.has_owner => return Err("claimed twice".to_owned()),
            r::SET_OWNER => self.has_owner = true,
            r::SET_FEATURES => self.features = message.u64_at(0).unwrap(),
            r::RESET_DEVICE => {
                (self.features, self.cache) = (0, 1);
                self.rings.values_mut().for_each(|ring| ring.is_enabled = false);
            }
            r::GET_CONFIG => {
                let mut body = message.body.clone();
                body[12..20].copy_from_slice(&2048_u64.to_le_bytes());
                return Ok(Message::reply(request, body, Vec::new()));
            }
            r::SET_CONFIG => self.cache = message.body[12],
            r::SET_LOG_BASE => {
                self.log = Some(message.body.clone());
                return Ok(Message::reply(request, message.body.clone(), Vec::new()));
            }
            r::SET_MEM_TABLE => {
                self.memory.clear();
                let mut last = None;
                for (region, file) in message.body[8..].chunks(32).zip(&message.files) {
                    let guest = u64::from_le_bytes(region[..8].try_into().unwrap());
                    if last.replace(guest).is_some_and(|last| last > guest) {
                        return Err("not in order".to_owned());
                    }
                    self.memory.insert(guest, (region.to_vec(), file.clone()));
                }
            }
            r::ADD_MEM_REG => {
                let region = message.body[8..].to_vec();
                let guest = u64::from_le_bytes(region[..8].try_into().unwrap());
                if self.memory.insert(guest, (region, message.files[0].clone())).is_some() {
                    return Err("added twice".to_owned());
                }
            }
            r::REM_MEM_REG => {
                let guest = message.u64_at(8).unwrap();
                self.memory.remove(&guest).ok_or("removed twice")?;
            }
            r::SET_VRING_NUM
            | r::SET_VRING_BASE
            | r::SET_VRING_ADDR
            | r::SET_VRING_ENABLE
            | r::SET_VRING_CALL
            | r::SET_VRING_ERR
            | r::SET_VRING_KICK => {
                let mut ring = ring(self);
                let number = message.u32_at(4).unwrap();
                match request {
                    r::SET_VRING_NUM => ring.num = number,
                    r::SET_VRING_BASE => ring.base = number,
                    r::SET_VRING_ADDR => {
                        let user = message.u64_at(8).unwrap();
                        let is_there = self.memory.values().any(|(region, _)| {
                            let from = u64::from_le_bytes(region[16..24].try_into().unwrap());
                            (from..from + REGION).contains(&user)
                        });
                        if !is_there {
                            return Err("a ring outside of memory".to_owned());
                        }
                        ring.addr = Some(message.body.clone());
                    }
                    r::SET_VRING_ENABLE if !is_on => return Err("not negotiated".to_owned()),
                    r::SET_VRING_ENABLE => ring.is_enabled = number != 0,
                    r::SET_VRING_CALL => ring.call = message.files.first().cloned(),
                    r::SET_VRING_ERR => ring.error = message.files.first().cloned(),
                    _ => ring.kick = message.files.first().cloned(),
                }
                self.rings.insert(index, ring);
            }
            r::GET_VRING_BASE => {
                let base = used[index as usize];
                let mut ring = ring(self);
                (ring.kick, ring.call, ring.base) = (None, None, base);
                self.rings.insert(index, ring);
                return Ok(Message::reply(
                    request,
                    state_message(request, index, base).body,
                    Vec::new(),
                ));
            }
            other => return Err(format!("request {other} was passed on")),
        }
        assert!(message.needs_reply() && is_negotiated | self.is_negotiated, "{request}");
        value(0)
    }

    /// What does not differ between servers that a frontend cannot tell apart.
    pub(crate) fn seen(&self) -> Self {
        let mut seen = self.clone();
        // A ring that does not run may be anywhere: it is told before it does.
        for ring in seen.rings.values_mut().filter(|ring| ring.kick.is_none()) {
            ring.addr = None;
        }
        seen.rings.retain(|_, ring| *ring != Ring::default());
        seen
    }
}
