//! Packets as the supervisor reads them, and what it keeps of the vaults in them.
//!
//! What has to hold: a packet is a message, or an error behind which the next one is read; a vault
//! that refers to what never came changes nothing; what is held is what the list refers to, each
//! descriptor the one that came last under its number, and no other stays open.

use crate::input::Input;
use crate::packets::{Packets, mutated, vault, with_packets};
use channel::{Kept, Received, ToSupervisor};
use rustix::fs::fstat;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use supervisor::vault::Vault;

/// What a script has brought about.
#[derive(Default)]
struct World {
    vault: Vault,
    /// What the vault has to have: the list, and which file is under each number.
    list: Option<channel::Vault>,
    files: BTreeMap<Kept, (u64, u64)>,
}

fn file_of(descriptor: impl AsFd) -> (u64, u64) {
    let stat = fstat(descriptor).expect("it is open");
    (stat.st_dev, stat.st_ino)
}

/// Carries a script out.
pub fn one_input(bytes: &[u8]) {
    with_packets(|packets| script(bytes, packets));
}

fn script(bytes: &[u8], packets: &mut Packets) {
    let mut input = Input::new(bytes);
    let mut world = World::default();
    while !input.is_empty() {
        match input.below(8) {
            0 => {
                let (bytes, count) = (input.bytes(64), input.below(4));
                packets.raw(bytes, count);
            }
            1 => {
                let message = any(&mut input);
                let bytes = mutated(&message, &mut input);
                let count = input.below(6);
                packets.raw(&bytes, count);
            }
            2..=6 => {
                let (vault, new) = (vault(&mut input), news(&mut input));
                let count = if input.one_in(8) { input.below(10) } else { new.len() };
                let message = ToSupervisor::Vault { vault: Box::new(vault), new };
                let bytes = serde_json::to_vec(&message).expect("it is JSON");
                packets.raw(&bytes, count);
            }
            _ => {
                if let Some(name) = world.vault.fall_back() {
                    let list = world.list.as_mut().expect("there is one");
                    let standby = list.standby.take().expect("there is one");
                    assert_eq!(name, standby.name);
                    (list.generation, list.fault) = (list.generation.wrapping_add(1), None);
                    list.live = Some(standby);
                }
            }
        }
        world.receive(packets);
        world.check();
    }
}

/// Numbers of objects that come.
fn news(input: &mut Input<'_>) -> Vec<Kept> {
    (0..input.below(8)).map(|_| Kept::from(input.u8() % 8)).collect()
}

fn any(input: &mut Input<'_>) -> ToSupervisor {
    let word = || "word".to_owned();
    match input.below(8) {
        0 => ToSupervisor::Ready {
            version: 1,
            program: word(),
            serves: word(),
            tells_events: false,
            confined: false,
        },
        1 => ToSupervisor::Failed { code: word(), message: word() },
        2 => ToSupervisor::SessionEnded { number: input.u64(), error: None },
        3 => ToSupervisor::Pong { number: input.u64(), stuck: vec![input.u16()] },
        4 => ToSupervisor::Stopped { drain_ns: input.u64() },
        5 => ToSupervisor::InflightTaken,
        _ => ToSupervisor::Vault { vault: Box::new(vault(input)), new: news(input) },
    }
}

impl World {
    fn receive(&mut self, packets: &Packets) {
        loop {
            match packets.to.try_receive::<ToSupervisor>() {
                Ok(Received::Message(message, files)) => self.told(message, files),
                Ok(Received::Nothing) => return,
                Ok(Received::End) => panic!("the other side is there"),
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::InvalidData),
            }
        }
    }

    fn told(&mut self, message: ToSupervisor, descriptors: Vec<OwnedFd>) {
        let again = serde_json::to_vec(&message).expect("it is JSON");
        assert_eq!(serde_json::from_slice::<ToSupervisor>(&again).expect("as it was"), message);
        let ToSupervisor::Vault { vault, new } = message else { return };
        let mut files = self.files.clone();
        let known = new.iter().copied().zip(descriptors.iter().map(file_of));
        files.extend(known);
        let objects = vault.objects();
        let is_whole = new.len() == descriptors.len()
            && objects.iter().all(|object| files.contains_key(object));
        let taken = self.vault.take((*vault).clone(), &new, descriptors);
        assert_eq!(taken.is_ok(), is_whole, "{taken:?}");
        if is_whole {
            files.retain(|object, _| objects.contains(object));
            let held = format!("{:?}", self.vault).matches("Descriptor(").count();
            assert_eq!(held, objects.len(), "more is held than is referred to");
            (self.list, self.files) = (Some(*vault), files);
        }
    }

    fn check(&self) {
        assert_eq!(self.vault.list(), self.list.as_ref());
        let Some((list, descriptors)) = self.vault.give() else {
            assert!(self.list.is_none());
            return;
        };
        let objects = list.objects();
        assert_eq!(objects.len(), descriptors.len(), "not what the list refers to");
        for (object, descriptor) in objects.iter().zip(&descriptors) {
            assert_eq!(file_of(descriptor), self.files[object], "not what came as {object}");
        }
    }
}
