//! What servers leave, while the device goes from one to another.

use super::super::scripted::{server, serving, vault};
use super::*;
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
    let ToSupervisor::Vault { vault: list, .. } = vault(4, 7) else { unreachable!() };
    let lost = ToSupervisor::Vault { vault: list, new: Vec::new() };
    supervisor.told_by(Which::Current, lost, Vec::new());
    assert_eq!(supervisor.vault.list().map(|list| list.generation), Some(3));
    let at = supervisor.vault_again_at.expect("it is asked for again");
    assert!(supervisor.deadline().is_some_and(|deadline| deadline <= at));
    supervisor.settle_vault(at);
    // As long as it does not come.
    assert!(supervisor.vault_again_at.is_some_and(|again| again > at));
    supervisor.told_by(Which::Current, vault(4, 7), vec![file()]);
    assert_eq!(supervisor.vault_again_at, None);
}

/// One that the supervisor could not take, for want of descriptors.
fn lost(stage: &mut Stage) {
    let ToSupervisor::Vault { vault, .. } = vault(4, 7) else { unreachable!() };
    let lost = ToSupervisor::Vault { vault, new: Vec::new() };
    stage.supervisor.told_by(Which::Current, lost, Vec::new());
}

/// It comes in the end.
fn found(stage: &mut Stage) {
    stage.supervisor.told_by(Which::Current, vault(4, 7), vec![file()]);
}

/// It says what has been lost before it says that it has stopped.
#[test]
fn a_server_whose_vault_was_lost_says_it_again_before_it_is_stopped() {
    let mut stage = Stage::new(None);
    let (server, _candidate) = (stage.serve(), stage.begin_candidate(true));
    stage.exchange(Step::Holding);
    lost(&mut stage);
    let at = stage.supervisor.vault_again_at.expect("it is asked for again");
    stage.supervisor.settle_exchange(Instant::now());
    assert_eq!(told(&server), []);
    stage.supervisor.settle_vault(at);
    stage.supervisor.settle_exchange(at);
    assert_eq!(told(&server), [ToServer::VaultAgain], "it is asked for, and has not come");
    found(&mut stage);
    stage.supervisor.settle_exchange(at);
    assert!(matches!(told(&server)[..], [ToServer::Stop { .. }]));
}

#[test]
fn a_server_whose_vault_is_lost_when_it_stops_keeps_its_device() {
    let mut stage = Stage::new(None);
    let (server, candidate) = (stage.serve(), stage.begin_candidate(true));
    stage.exchange(Step::Stopping);
    lost(&mut stage);
    // It has stopped before it hears of that.
    let at = stage.supervisor.vault_again_at.expect("it is asked for again");
    stage.supervisor.settle_vault(at);
    say(&server, &ToSupervisor::Stopped { drain_ns: 0 });
    stage.supervisor.hear(Which::Current);
    assert_eq!(told(&server), [ToServer::VaultAgain, ToServer::Resume]);
    assert_eq!(told(&candidate), [ToServer::Exit]);
    say(&server, &ToSupervisor::Resumed);
    stage.supervisor.hear(Which::Current);
    assert!(stage.supervisor.exchange.is_none() && stage.supervisor.candidate.is_none());
    let at = stage.supervisor.vault_again_at.expect("it is asked for again");
    stage.supervisor.settle_vault(at);
    assert_eq!(told(&server), [ToServer::VaultAgain]);
}

#[test]
fn a_new_server_whose_vault_was_lost_says_it_again_when_it_is_ready() {
    let mut stage = Stage::new(None);
    let server = stage.serve();
    stage.supervisor.server.as_mut().unwrap().ready = None;
    lost(&mut stage);
    let at = stage.supervisor.vault_again_at.expect("it is asked for again");
    stage.supervisor.settle_vault(at);
    assert_eq!(told(&server), [], "it hears no commands yet");
    assert!(stage.supervisor.deadline().is_none_or(|deadline| deadline > at));
    say(&server, &ready());
    stage.supervisor.hear(Which::Current);
    stage.supervisor.settle_vault(at);
    assert!(told(&server).contains(&ToServer::VaultAgain));
}

/// The next program does not know that it was lost.
#[test]
fn another_program_waits_for_a_vault_that_was_lost() {
    let mut stage = Stage::new(None);
    let _server = stage.serve();
    assert_eq!(stage.supervisor.unrest(), None);
    lost(&mut stage);
    assert!(stage.supervisor.unrest().is_some());
    let at = stage.supervisor.vault_again_at.expect("it is asked for again");
    stage.supervisor.settle_vault(at);
    assert!(stage.supervisor.unrest().is_some(), "it is asked for, and has not come");
    found(&mut stage);
    assert_eq!(stage.supervisor.unrest(), None);
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
