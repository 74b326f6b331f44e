//! Exchanges in which something dies or is missing.

use super::*;

impl Stage {
    /// The live module is another one: what was prepared before cannot be promoted.
    fn upgrade(&mut self) {
        let live = Some(module("b", 2));
        let list = channel::Vault { generation: 4, live, ..channel::Vault::default() };
        self.supervisor.vault.take(list, &[2], vec![file()]).unwrap();
    }

    fn step(&self) -> Option<Step> {
        self.supervisor.exchange.as_ref().map(|exchange| exchange.step)
    }
}

#[test]
fn an_exchange_is_over_when_its_server_dies_and_its_candidate_is_of_another_module() {
    let mut stage = Stage::new(None);
    let (_old, _candidate) = (stage.serve(), stage.begin_candidate(true));
    stage.exchange(Step::Stopping);
    stage.upgrade();
    stage.supervisor.current_has_died(Ended::Signalled(11));
    assert_eq!(stage.step(), None);
    assert!(stage.supervisor.candidate.is_none());
    assert!(stage.supervisor.server.is_some(), "another one is started");
}

#[test]
fn a_candidate_that_is_prepared_while_no_server_lives_serves() {
    let mut stage = Stage::new(None);
    let candidate = stage.begin_candidate(false);
    stage.exchange(Step::Preparing);
    let now = Instant::now();
    stage.supervisor.died_at = Some(now);
    stage.supervisor.start_at = Some(now + Duration::from_secs(1));
    say(&candidate, &prepared());
    stage.supervisor.hear(Which::Candidate);
    assert!(matches!(told(&candidate)[..], [ToServer::Activate { .. }]));
    assert!(stage.supervisor.server.is_some() && stage.supervisor.candidate.is_none());
    assert_eq!((stage.supervisor.start_at, stage.step()), (None, None));
}

#[test]
fn a_server_is_told_to_stop_when_it_serves() {
    let mut stage = Stage::new(None);
    let (server, _candidate) = (stage.serve(), stage.begin_candidate(true));
    stage.exchange(Step::Holding);
    let ready = stage.supervisor.server.as_mut().unwrap().ready.take();
    stage.supervisor.settle_exchange(Instant::now());
    assert_eq!((told(&server), stage.step()), (Vec::new(), Some(Step::Holding)));
    stage.supervisor.server.as_mut().unwrap().ready = ready;
    stage.supervisor.settle_exchange(Instant::now());
    assert!(matches!(told(&server)[..], [ToServer::Stop { .. }]));
    assert_eq!(stage.step(), Some(Step::Stopping));
}

/// Its frontend is given to no server before an upgrade has brought a module.
#[test]
fn an_exchange_is_over_without_a_session_that_waits_for_an_upgrade() {
    let mut stage = Stage::new(None);
    let _server = stage.serve();
    let _frontend = stage.connect();
    stage.exchange(Step::Replaying);
    stage.supervisor.settle_exchange(Instant::now());
    assert_eq!(stage.step(), Some(Step::Replaying), "the session is to be what it was");
    stage.supervisor.vault.drop_live("none");
    stage.supervisor.settle_exchange(Instant::now());
    assert_eq!(stage.step(), None);
}
