//! A private channel whose one end sends any packets at all, and vaults for them.

use crate::input::Input;
use crate::pool;
use channel::{Bytes, Channel, Kept, Module, Region, Stored, Vault};
use rustix::io::IoSlice;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

thread_local! {
    static POOL: Vec<OwnedFd> = pool::descriptors();
    /// The same for all scripts: each reads all that it has sent.
    static PACKETS: RefCell<Packets> = RefCell::new(Packets::new());
}

/// Has a script use the channel; whatever it opens has to be closed in the end.
pub fn with_packets(script: impl FnOnce(&mut Packets)) {
    POOL.with(|_| ());
    PACKETS.with_borrow_mut(|packets| {
        let free = pool::lowest_free();
        packets.sent = 0;
        script(packets);
        assert_eq!(pool::lowest_free(), free, "a descriptor stays open");
    });
}

/// A channel.
pub struct Packets {
    from: OwnedFd,
    /// The end that is read.
    pub to: Channel,
    sent: usize,
}

impl Packets {
    fn new() -> Self {
        let (to, from) = channel::pair().expect("a channel");
        Self { from, to, sent: 0 }
    }

    /// Sends these bytes with so many descriptors.
    pub fn raw(&mut self, bytes: &[u8], count: usize) {
        POOL.with(|pool| {
            let all = pool.iter().cycle().skip(self.sent);
            let files: Vec<BorrowedFd<'_>> = all.take(count).map(AsFd::as_fd).collect();
            self.sent = (self.sent + count) % pool.len();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !files.is_empty() {
                assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
            }
            if bytes.is_empty() && files.is_empty() {
                // It would be taken for the end.
                return;
            }
            let sent =
                sendmsg(&self.from, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty());
            assert_eq!(sent, Ok(bytes.len()));
        });
    }
}

/// A message as JSON, with some changes.
pub fn mutated(message: &impl Serialize, input: &mut Input<'_>) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(message).expect("it is JSON");
    for _ in 0..input.below(4) {
        let at = usize::from(input.u16()) % (bytes.len() + 1);
        match input.below(4) {
            0 => bytes.truncate(at),
            1 => {
                let end = (at + input.below(12)).min(bytes.len());
                bytes.drain(at..end);
            }
            2 => {
                let more: &[u8] =
                    input.pick(&[b"null", b"-1", b"1e99", b"[]", b"{}", b"\"", b",", b"\xff"]);
                bytes.splice(at..at, more.iter().copied());
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = input.u8();
                }
            }
        }
    }
    bytes
}

fn object(input: &mut Input<'_>) -> Kept {
    Kept::from(input.u8() % 8)
}

fn module(input: &mut Input<'_>) -> Module {
    let image = object(input);
    Module {
        name: format!("m{image}"),
        version: "1".to_owned(),
        path: "/m".into(),
        sha256: "00".to_owned(),
        signature: None,
        params: BTreeMap::new(),
        image,
    }
}

/// A vault with few objects.
pub fn vault(input: &mut Input<'_>) -> Vault {
    let key = |at: usize| format!("k{at}");
    Vault {
        generation: input.u8().into(),
        live: input.one_in(2).then(|| module(input)),
        standby: input.one_in(3).then(|| module(input)),
        fault: input.one_in(8).then(|| "f".to_owned()),
        schema: input.u8().into(),
        regions: (0..input.below(3))
            .map(|at| {
                let len = input.pick(&[0, 1, 4096, 8192, 8193, 65536, 1 << 40, u64::MAX]);
                Region { key: key(at), len, memfd: object(input) }
            })
            .collect(),
        bytes: (0..input.below(3)).map(|at| Bytes { key: key(at), memfd: object(input) }).collect(),
        files: (0..input.below(3)).map(|at| Stored { key: key(at), file: object(input) }).collect(),
        failure: None,
        counters: BTreeMap::new(),
        required: input.u8().into(),
        told: match input.below(4) {
            0 => serde_json::Value::Null,
            1 => serde_json::json!({ "belief": { "session": input.u8() } }),
            2 => serde_json::json!({ "device": { "capacity": input.u64() } }),
            _ => serde_json::json!({}),
        },
    }
}
