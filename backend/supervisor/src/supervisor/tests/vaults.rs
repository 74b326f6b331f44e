//! What servers leave, while the device goes from one to another.

use super::super::scripted::{file, ready, server, serving, vault};
use super::super::*;
use crate::process::Ended;
use channel::ToSupervisor;
use serde_json::json;

/// The server has stopped, and another one was given its device.
fn activating() -> (tempfile::TempDir, Supervisor) {
    let directory = tempfile::tempdir().unwrap();
    let mut supervisor = serving(directory.path());
    supervisor.stopped = supervisor.server.take();
    supervisor.vault_before = Some(supervisor.vault.clone());
    supervisor.server = Some(server());
    (directory, supervisor)
}

#[test]
fn what_a_server_that_failed_has_said_is_not_kept() {
    let (_directory, mut supervisor) = activating();
    supervisor.told_by(Which::Current, vault(3, 2), vec![file()]);
    supervisor.current_has_died(Ended::Signalled(9));
    // The old one names its object by its own number, as before.
    let ToSupervisor::Vault { vault, .. } = vault(4, 1) else { unreachable!() };
    let again = ToSupervisor::Vault { vault, new: Vec::new() };
    supervisor.told_by(Which::Current, again, Vec::new());
    assert_eq!(supervisor.vault.list().map(|list| list.generation), Some(4));
    assert_eq!(supervisor.vault_again_at, None);
}

#[test]
fn a_vault_that_was_lost_is_asked_for_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut supervisor = serving(directory.path());
    let ToSupervisor::Vault { vault, .. } = vault(4, 7) else { unreachable!() };
    let lost = ToSupervisor::Vault { vault, new: Vec::new() };
    supervisor.told_by(Which::Current, lost, Vec::new());
    assert_eq!(supervisor.vault.list().map(|list| list.generation), Some(3));
    let at = supervisor.vault_again_at.expect("it is asked for again");
    assert!(supervisor.deadline().is_some_and(|deadline| deadline <= at));
    supervisor.settle_vault(at);
    assert_eq!(supervisor.vault_again_at, None);
}

#[test]
fn what_has_happened_to_a_stopped_server_is_known_when_it_leaves() {
    let (_directory, mut supervisor) = activating();
    let (ours, theirs) = channel::pair().unwrap();
    supervisor.stopped.as_mut().unwrap().channel = ours;
    let event = json!({"event": "ended", "change": "upgrade", "outcome": "committed"});
    let happened = ToSupervisor::Happened { event };
    channel::Channel::from_socket(theirs).send(&happened, &[]).unwrap();
    let before = supervisor.watched.tally.clone();
    supervisor.told_by(Which::Current, ready(), Vec::new());
    assert!(supervisor.stopped.is_none());
    assert_ne!(supervisor.watched.tally, before);
}
