//! Packets as the server reads them: the vault that it begins with, and the in-flight regions of
//! its sessions.
//!
//! What has to hold: a packet is a message, or an error behind which the next one is read; a vault
//! whose descriptors are not those that it refers to is refused, and so is one whose memory is not
//! as long as it says; one that is taken has what the list says, and no more. A region that is
//! taken is all there: each queue of it can be looked at. No descriptor stays open.

use crate::input::Input;
use crate::packets::{Packets, mutated, vault, with_packets};
use crate::vault::saved_of;
use channel::{InflightRegion, Received, Session, Settings, Start, ToServer, Vault};
use rustix::fs::fstat;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use virtqueue::inflight::{Region, Ring, Tracker};

/// Carries a script out.
pub fn one_input(bytes: &[u8]) {
    with_packets(|packets| script(bytes, packets));
}

fn script(bytes: &[u8], packets: &mut Packets) {
    let mut input = Input::new(bytes);
    while !input.is_empty() {
        if input.one_in(8) {
            let (bytes, count) = (input.bytes(64), input.below(4));
            packets.raw(bytes, count);
        } else {
            let (message, expected) = any(&mut input);
            let bytes = if input.one_in(4) {
                mutated(&message, &mut input)
            } else {
                serde_json::to_vec(&message).expect("it is JSON")
            };
            let count = if input.one_in(8) { input.below(10) } else { expected };
            packets.raw(&bytes, count);
        }
        receive(packets);
    }
}

/// A message, and how many descriptors belong to it.
fn any(input: &mut Input<'_>) -> (ToServer, usize) {
    match input.below(10) {
        0..=2 => {
            let vault = Box::new(vault(input));
            let count = vault.objects().len();
            let settings = Settings {
                queues: input.u16(),
                queue_size: input.u16(),
                poll_us: input.u64(),
                worker_cpus: Vec::new(),
                domain_dirs: Vec::new(),
                trusted_keys: Vec::new(),
                sandbox: None,
                limits: channel::RateLimits::default(),
            };
            let start = Start::Vault(vault);
            let prepare_only = input.one_in(2);
            (
                ToServer::Start {
                    version: 1,
                    settings,
                    start,
                    prepare_only,
                    hears_aside: false,
                    hears_events: false,
                },
                count,
            )
        }
        3 | 4 => {
            let vault = Box::new(vault(input));
            let count = vault.objects().len();
            (ToServer::Activate { vault }, count)
        }
        5 | 6 => {
            let inflight = Some(place(input));
            (ToServer::Session(Session { number: 1, inflight, ..Session::default() }), 2)
        }
        7 | 8 => (ToServer::Inflight(place(input)), 1),
        _ => {
            let others =
                [ToServer::Client, ToServer::Resume, ToServer::Exit, ToServer::Ping { number: 1 }];
            (others[input.below(others.len())].clone(), 1)
        }
    }
}

fn place(input: &mut Input<'_>) -> InflightRegion {
    let wild = input.u64();
    InflightRegion {
        offset: input.pick(&[0, 0, 0, 64, 4096, wild, u64::MAX]),
        len: input.pick(&[0, 320, 640, 4096, 8192, 65536, wild, u64::MAX]),
        queues: input.pick(&[0, 1, 2, 3, u16::MAX]),
        queue_size: input.pick(&[0, 1, 16, 128, 32768, u16::MAX]),
        leaves: wild & 1 != 0,
    }
}

fn receive(packets: &Packets) {
    loop {
        match packets.to.try_receive::<ToServer>() {
            Ok(Received::Message(message, files)) => told(message, files),
            Ok(Received::Nothing) => return,
            Ok(Received::End) => panic!("the other side is there"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::InvalidData),
        }
    }
}

fn told(message: ToServer, descriptors: Vec<OwnedFd>) {
    let again = serde_json::to_vec(&message).expect("it is JSON");
    assert_eq!(serde_json::from_slice::<ToServer>(&again).expect("as it was"), message);
    let mut descriptors = descriptors;
    match message {
        ToServer::Start { start: Start::Vault(vault), .. } | ToServer::Activate { vault } => {
            take(&vault, descriptors);
        }
        // The first is the listening socket.
        ToServer::Session(Session { inflight: Some(place), .. }) if descriptors.len() == 2 => {
            map(place, descriptors.remove(1));
        }
        ToServer::Inflight(place) if descriptors.len() == 1 => map(place, descriptors.remove(0)),
        _ => {}
    }
}

fn len_of(descriptor: impl AsFd) -> u64 {
    fstat(descriptor).map_or(0, |stat| stat.st_size as u64)
}

fn take(vault: &Vault, descriptors: Vec<OwnedFd>) {
    let objects = vault.objects();
    let lens: Vec<u64> = descriptors.iter().map(len_of).collect();
    let saved = saved_of(vault, descriptors);
    if objects.len() != lens.len() {
        assert!(saved.is_err(), "{} objects, {} descriptors", objects.len(), lens.len());
        return;
    }
    let Ok((saved, ..)) = saved else { return };
    let len = |object: u64| lens[objects.iter().position(|&one| one == object).expect("one")];
    assert_eq!(saved.generation, vault.generation);
    assert_eq!(
        (saved.live.is_some(), saved.standby.is_some()),
        (vault.live.is_some(), vault.standby.is_some())
    );
    let storage = &saved.storage;
    for region in &vault.regions {
        let kept = &storage.regions[&region.key];
        assert_eq!(kept.len() as u64, region.len);
        assert!(region.len <= len(region.memfd), "memory behind the end of its file");
    }
    for bytes in &vault.bytes {
        assert_eq!(storage.bytes[&bytes.key].len() as u64, len(bytes.memfd));
    }
    for file in &vault.files {
        assert!(storage.files.contains_key(&file.key));
    }
}

fn map(place: InflightRegion, memfd: OwnedFd) {
    let InflightRegion { offset, len, queues, queue_size, leaves: _ } = place;
    let there = len_of(&memfd);
    let Ok(region) = Region::map(File::from(memfd), offset, len, queues, queue_size) else {
        return;
    };
    assert!(offset.checked_add(len).is_some_and(|end| end <= there), "{place:?} of {there}");
    let region = Arc::new(region);
    for queue in 0..usize::from(queues).min(4) {
        let ring = Ring { size: queue_size, used_idx: 7, avail_idx: 9 };
        if let Ok((_, recovery)) = Tracker::start(&region, queue, ring) {
            assert!(recovery.resubmit.len() <= 2);
        }
    }
    assert!(
        Tracker::start(&region, queues.into(), Ring { size: 1, used_idx: 0, avail_idx: 0 })
            .is_err()
    );
}
