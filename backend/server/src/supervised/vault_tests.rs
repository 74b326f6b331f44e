//! Vaults that cannot be sent, and that cannot be gone on with.

use super::told::Believed;
use super::vault::{AsKeeper, VaultSender, saved_of};
use crate::testing::{PATIENCE, Puppets};
use channel::{Bytes, Channel, RateLimits, Received, Region, Stored, ToSupervisor, Vault};
use proxy::DomainProxy;
use puppet::{PuppetLoader, Stage};
use rustix::fs::{SealFlags, fcntl_add_seals, ftruncate};
use rustix::net::sockopt::set_socket_send_buffer_size;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longer than what fits into the smallest buffer that a socket can have.
const LONG: usize = 16 << 10;

/// A device whose vault is long.
fn puppets() -> Puppets {
    let stage = Stage::new();
    let params = stage.params(&"x".repeat(LONG), &[]);
    let proxy = DomainProxy::start(Box::new(PuppetLoader), "plain", params, 1);
    Puppets { proxy: proxy.expect("a puppet starts"), stage }
}

#[test]
fn a_vault_that_cannot_be_sent_is_owed_and_sent_when_it_can_be() {
    let puppets = puppets();
    let (ours, theirs) = channel::pair().expect("a channel");
    let (ours, theirs) = (Arc::new(ours), Channel::from_socket(theirs));
    let limits = Box::new(RateLimits::default);
    let vault = VaultSender::new(&ours, &puppets.proxy, Believed::default(), limits, false);
    let vault = Arc::new(vault);
    // As if there were too little memory for it.
    set_socket_send_buffer_size(&*ours, 0).expect("the smallest");
    puppets.proxy.keep_with(Box::new(AsKeeper(Arc::clone(&vault))), None);
    let why = vault.settle().expect_err("the supervisor does not have it");
    assert!(why.contains("too long"), "{why}");
    assert!(matches!(theirs.try_receive::<ToSupervisor>(), Ok(Received::Nothing)));
    set_socket_send_buffer_size(&*ours, 1 << 20).expect("a large one");
    // Nothing else happens to the device.
    let deadline = Instant::now() + PATIENCE;
    let came = loop {
        match theirs.try_receive::<ToSupervisor>() {
            Ok(Received::Nothing) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            came => break came,
        }
    };
    assert!(matches!(came, Ok(Received::Message(ToSupervisor::Vault { .. }, _))), "{came:?}");
    assert_eq!(vault.settle(), Ok(()));
}

#[test]
fn what_is_in_a_vault_twice_is_refused() {
    let key = || "a".to_owned();
    let of = |vault: &Vault| {
        let files = vault.objects().into_iter().map(|_| {
            let memfd = channel::memfd("a").expect("a memfd");
            ftruncate(&memfd, 4096).expect("its length");
            fcntl_add_seals(&memfd, SealFlags::SHRINK).expect("its seal");
            memfd
        });
        saved_of(vault, files.collect()).map(|_| ())
    };
    let (bytes, stored) = (|memfd| Bytes { key: key(), memfd }, |file| Stored { key: key(), file });
    let region = |memfd| Region { key: key(), len: 4096, memfd };
    let once = Vault {
        bytes: vec![bytes(1)],
        regions: vec![region(2)],
        files: vec![stored(3)],
        told: serde_json::json!({}),
        ..Vault::default()
    };
    assert_eq!(of(&once), Ok(()));
    let (mut two_bytes, mut two_regions, mut two_files) = (once.clone(), once.clone(), once);
    two_bytes.bytes.push(bytes(4));
    two_regions.regions.push(region(4));
    two_files.files.push(stored(4));
    for twice in [two_bytes, two_regions, two_files] {
        let why = of(&twice).expect_err("which one?");
        assert!(why.contains("twice"), "{why}");
    }
}
