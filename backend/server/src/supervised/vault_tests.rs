//! Vaults that cannot be sent.

use super::told::Believed;
use super::vault::{AsKeeper, VaultSender};
use crate::testing::{PATIENCE, Puppets};
use channel::{Channel, RateLimits, Received, ToSupervisor};
use proxy::DomainProxy;
use puppet::{PuppetLoader, Stage};
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
