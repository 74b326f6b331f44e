//! Exchanges in which something dies or is missing.

use super::*;
use crate::deaths::Death;

impl Stage {
    /// The live module is another one: what was prepared before cannot be promoted.
    fn upgrade(&mut self) {
        let live = Some(module("b", 2));
        let list = channel::Vault { generation: 4, live, ..channel::Vault::default() };
        self.supervisor.vault.take(list, &[2], vec![file()]).unwrap();
    }

    /// Servers have crashed so often that one more time is too much.
    fn crash_often(&mut self) {
        let served = Some(Duration::from_millis(200));
        let death = Death { served, is_crash: true, module: None, oldest: Vec::new() };
        let choices = crate::deaths::Choices { has_program: false, has_standby: false };
        (0..9).for_each(|_| _ = self.supervisor.deaths.died(&death, choices));
    }

    /// An exchange whose candidate has the device, and is not ready.
    fn activating(&mut self) -> (Played, Played) {
        let old = self.serve();
        let new = self.begin_candidate(true);
        self.supervisor.candidate.as_mut().unwrap().server.program = other_program();
        self.exchange(Step::Stopping);
        self.supervisor.has_stopped(0);
        (old, new)
    }

    fn step(&self) -> Option<Step> {
        self.supervisor.exchange.as_ref().map(|exchange| exchange.step)
    }

    fn path(&self) -> &str {
        self.supervisor.options.program.path.to_str().unwrap()
    }
}

fn other_program() -> Program {
    Program::open(Path::new("/bin/ls")).unwrap()
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
fn an_exchange_and_its_candidate_are_over_when_the_device_is_given_up() {
    for step in [Step::Preparing, Step::Holding, Step::Stopping] {
        let mut stage = Stage::new(None);
        let (_old, _candidate) = (stage.serve(), stage.begin_candidate(true));
        stage.exchange(step);
        stage.crash_often();
        stage.supervisor.current_has_died(Ended::Signalled(11));
        assert!(stage.supervisor.is_given_up, "{step:?}");
        assert_eq!(stage.step(), None, "{step:?}");
        assert!(stage.supervisor.candidate.is_none(), "{step:?}");
    }
}

/// It has the module that no server has lived with.
#[test]
fn a_spare_does_not_serve_when_the_device_is_given_up() {
    for is_prepared in [false, true] {
        let mut stage = Stage::new(None);
        let (_old, spare) = (stage.serve(), stage.begin_candidate(is_prepared));
        stage.crash_often();
        stage.supervisor.current_has_died(Ended::Signalled(11));
        say(&spare, &prepared());
        stage.supervisor.hear(Which::Candidate);
        assert!(stage.supervisor.is_given_up && stage.supervisor.server.is_none());
        assert!(stage.supervisor.candidate.is_none());
        assert_eq!(told(&spare), [ToServer::Exit]);
    }
}

#[test]
fn a_candidate_that_is_prepared_while_no_server_lives_serves() {
    let mut stage = Stage::new(None);
    let candidate = stage.begin_candidate(false);
    stage.exchange(Step::Preparing);
    let now = Instant::now();
    stage.supervisor.outage = Some(Outage { since: now, why: String::new() });
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
    let now = Instant::now();
    stage.supervisor.settle_exchange(now);
    assert!(matches!(told(&server)[..], [ToServer::Stop { .. }]));
    assert_eq!(stage.step(), Some(Step::Stopping));
    // It has as long as the bounds of the server add up to.
    stage.supervisor.settle_exchange(now + Duration::from_secs(65));
    assert!(stage.supervisor.server.as_ref().unwrap().ended().is_none());
    assert_eq!(stage.step(), Some(Step::Stopping));
    let deadline = stage.supervisor.exchange.as_ref().map(Exchange::deadline);
    assert!(deadline > Some(now + Duration::from_secs(65)));
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

#[test]
fn an_exchange_whose_old_server_dies_is_no_success_before_the_new_one_serves() {
    let mut stage = Stage::new(None);
    let (old, new) = stage.activating();
    drop(old);
    stage.turn_until(|supervisor| supervisor.stopped.is_none());
    stage.supervisor.settle_exchange(Instant::now());
    assert_eq!(stage.step(), Some(Step::Activating));
    say(&new, &ready());
    stage.turn_until(|supervisor| supervisor.exchange.is_none());
    // The next death does not undo it.
    assert_eq!(stage.path(), "/bin/ls");
    let before = stage.supervisor.program_before.take();
    assert_eq!(before.map(|program| program.path), Some("/bin/cat".into()));
}

#[test]
fn an_exchange_in_which_both_servers_die_leaves_the_program_as_it_was() {
    let mut stage = Stage::new(None);
    let (old, new) = stage.activating();
    drop(old);
    stage.turn_until(|supervisor| supervisor.stopped.is_none());
    drop(new);
    stage.turn_until(|supervisor| supervisor.exchange.is_none());
    assert_eq!(stage.path(), "/bin/true");
    assert!(stage.supervisor.program_before.is_none());
}

/// It is the only one that can.
#[test]
fn a_new_server_ends_the_daemon_when_the_old_one_is_dead() {
    let mut stage = Stage::new(None);
    let (old, new) = stage.activating();
    drop(old);
    stage.turn_until(|supervisor| supervisor.stopped.is_none());
    stage.supervisor.end("x");
    assert!(matches!(told(&new)[..], [ToServer::Activate { .. }]));
    say(&new, &ready());
    stage.supervisor.hear(Which::Current);
    assert_eq!(told(&new), [ToServer::Shutdown { why: "x".into() }]);
}

/// What it has open elsewhere is closed by it, and not waited for by others.
#[test]
fn a_candidate_that_is_not_needed_leaves_by_itself_or_is_ended() {
    for is_prepared in [false, true] {
        let mut stage = Stage::new(None);
        let (_server, candidate) = (stage.serve(), stage.begin_candidate(is_prepared));
        stage.supervisor.dismiss_candidate();
        assert_eq!(told(&candidate), [ToServer::Exit]);
        std::thread::sleep(Duration::from_millis(50));
        let left = &stage.supervisor.leaving;
        assert!(matches!(&left[..], [(server, _)] if server.ended().is_none()), "it was killed");
        stage.supervisor.settle_leaving(Instant::now() + LEAVE_PATIENCE);
        stage.turn_until(|supervisor| supervisor.leaving.is_empty());
    }
}

/// Its program is older than the sandbox, and ignores what it was told.
#[test]
fn a_candidate_that_does_not_confine_itself_is_refused() {
    for (enforces, confined, is_fit) in
        [(true, false, false), (true, true, true), (false, false, true)]
    {
        let mut stage = Stage::new(None);
        let sandbox = channel::Sandbox { enforces, ..channel::Sandbox::default() };
        stage.supervisor.options.settings.sandbox = Some(sandbox);
        let (_old, candidate) = (stage.serve(), stage.begin_candidate(false));
        stage.exchange(Step::Preparing);
        let (version, program) = (channel::VERSION, "0.9.0".to_owned());
        say(&candidate, &ToSupervisor::Prepared { version, program, confined });
        stage.supervisor.hear(Which::Candidate);
        let is_prepared = stage.supervisor.candidate.as_ref().is_some_and(|one| one.is_prepared);
        assert_eq!(is_prepared, is_fit, "{enforces} {confined}");
        if !is_fit {
            let failure = &stage.supervisor.candidate.as_ref().unwrap().server.failure;
            assert!(failure.as_ref().is_some_and(|(_, why)| why.contains("--sandbox=on")));
            stage.turn_until(|supervisor| supervisor.candidate.is_none());
            assert_eq!(stage.step(), None);
            assert!(stage.supervisor.serving().is_some(), "the old one goes on");
        }
    }
}

#[test]
fn all_servers_are_known_to_be_some() {
    let mut stage = Stage::new(None);
    let played = [stage.serve(), stage.begin_candidate(true)];
    stage.supervisor.stopped = Some(scripted::server());
    stage.supervisor.leaving.push((scripted::server(), Instant::now()));
    let supervisor = &stage.supervisor;
    let whiches: Vec<_> = supervisor.whiches().collect();
    let pid = |which| supervisor.which(which).unwrap().pid.as_raw_nonzero().get();
    let mut pids: Vec<_> = whiches.into_iter().map(|which| pid(which) as u32).collect();
    let mut known = supervisor.server_pids();
    pids.sort_unstable();
    known.sort_unstable();
    assert_eq!((pids.len(), pids), (4, known));
    drop(played);
}
