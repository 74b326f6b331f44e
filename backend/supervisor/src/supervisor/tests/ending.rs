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
