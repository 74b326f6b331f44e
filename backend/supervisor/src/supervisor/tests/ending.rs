//! The end, at any moment.

use super::*;

fn shutdown() -> ToServer {
    ToServer::Shutdown { why: "x".into() }
}

/// Its commands are not heard any more, and requests in flight have their time.
#[test]
fn a_server_that_ends_is_not_asked_whether_it_moves() {
    let timeout = Duration::from_secs(1);
    let mut stage = Stage::new(Some(timeout));
    let server = stage.serve();
    stage.supervisor.settle_pulse(Instant::now() + timeout);
    assert!(matches!(told(&server)[..], [ToServer::Ping { .. }]));
    stage.supervisor.end("x");
    for seconds in 2..6 {
        stage.supervisor.settle_pulse(Instant::now() + seconds * timeout);
    }
    say(&server, &ToSupervisor::Pong { number: 1, stuck: vec![0] });
    stage.supervisor.hear(Which::Current);
    assert_eq!(told(&server), [shutdown()]);
    // Nor does the loop turn for that.
    assert!(stage.supervisor.deadline().unwrap() > Instant::now() + 10 * timeout);
    assert_eq!(stage.supervisor.over, None);
    drop(server);
    stage.turn_until(|supervisor| supervisor.over.is_some());
    assert_eq!(stage.supervisor.over, Some(Ok(0)));
}

/// Amid an exchange: what the servers were told until then is not what the test is about.
fn amid(step: Step) -> (Stage, Played) {
    let mut stage = Stage::new(None);
    let old = stage.serve();
    stage.exchange(step);
    (stage, old)
}

/// The old server goes on, so that it can end in its order.
fn assert_ends_in_its_order(mut stage: Stage, old: Played) {
    say(&old, &ToSupervisor::Resumed);
    stage.supervisor.hear(Which::Current);
    assert_eq!(told(&old), [shutdown()]);
    assert_eq!(stage.supervisor.over, None);
    assert!(stage.supervisor.exchange.is_none(), "its client waits");
    drop(old);
    stage.turn_until(|supervisor| supervisor.over.is_some());
    assert_eq!(stage.supervisor.over, Some(Ok(0)));
}

#[test]
fn a_server_that_is_about_to_stop_says_first_whether_it_has() {
    let (mut stage, old) = amid(Step::Stopping);
    let _candidate = stage.begin_candidate(true);
    stage.supervisor.end("x");
    assert!(stage.supervisor.candidate.is_none(), "it is not needed any more");
    assert_eq!(told(&old), []);
    say(&old, &ToSupervisor::Stopped { drain_ns: 0 });
    stage.supervisor.hear(Which::Current);
    assert_eq!(told(&old), [ToServer::Resume]);
    assert_ends_in_its_order(stage, old);
}

#[test]
fn a_server_that_could_not_stop_ends() {
    let (mut stage, old) = amid(Step::Stopping);
    stage.supervisor.end("x");
    say(&old, &ToSupervisor::NotStopped { code: "busy".into(), message: "it is".into() });
    stage.supervisor.hear(Which::Current);
    assert_eq!(told(&old), [shutdown()]);
    assert!(stage.supervisor.exchange.is_none() && stage.supervisor.over.is_none());
}

#[test]
fn a_candidate_that_is_given_the_device_loses_it_to_the_server_that_ends() {
    let (mut stage, old) = amid(Step::Stopping);
    let candidate = stage.begin_candidate(true);
    stage.supervisor.has_stopped(0);
    assert!(matches!(told(&candidate)[..], [ToServer::Activate { .. }]));
    // It may be ready in the very moment.
    say(&candidate, &ready());
    stage.supervisor.end("x");
    assert_eq!(stage.supervisor.over, None);
    stage.turn_until(|supervisor| supervisor.stopped.is_none());
    assert_eq!(told(&old), [ToServer::Resume]);
    assert_ends_in_its_order(stage, old);
}

#[test]
fn a_server_that_was_called_back_goes_on_before_it_ends() {
    let (mut stage, old) = amid(Step::Resuming);
    stage.supervisor.end("x");
    assert_eq!(told(&old), []);
    assert_ends_in_its_order(stage, old);
}

/// There is a deadline for that, as for all else.
#[test]
fn a_server_that_does_not_come_back_is_ended() {
    let (mut stage, _old) = amid(Step::Resuming);
    stage.supervisor.end("x");
    stage.supervisor.settle_ending(Instant::now() + Duration::from_secs(17));
    assert_eq!(stage.supervisor.over, Some(Ok(1)));
}

/// What is tried again each second is not tried in an end that leaves the disk as it was.
#[test]
fn a_store_that_owes_something_does_not_keep_the_loop_turning() {
    let mut stage = Stage::new(None);
    let _server = stage.serve();
    stage.supervisor.vault.take(channel::Vault::default(), &[], Vec::new()).unwrap();
    stage.supervisor.store.owe();
    stage.supervisor.end("x");
    stage.supervisor.settle_store(Instant::now());
    assert_eq!(stage.supervisor.store.deadline(), None);
}

/// A service manager ends what is left when the supervisor has ended.
#[test]
fn a_candidate_that_leaves_has_ended_before_the_supervisor_does() {
    let mut stage = Stage::new(None);
    let (server, candidate) = (stage.serve(), stage.begin_candidate(true));
    let ended = stage.supervisor.candidate.as_ref().unwrap().server.pid;
    drop(server);
    stage.supervisor.end("x");
    let leaves = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(candidate);
    });
    let begun = Instant::now();
    let Stage { supervisor, _end, _directory } = stage;
    assert_eq!(supervisor.run(), Ok(0));
    assert!(begun.elapsed() >= Duration::from_millis(150), "{:?}", begun.elapsed());
    leaves.join().unwrap();
    assert!(crate::process::reap(rustix::process::WaitId::Pid(ended)));
}
