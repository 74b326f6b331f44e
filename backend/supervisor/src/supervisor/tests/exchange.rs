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
