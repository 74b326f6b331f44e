//! Servers that stand still, and are ended for that.

use super::*;

/// With a long timeout it takes longer than a server has to serve for what was before to be
/// forgotten.
#[test]
fn servers_that_stand_still_one_after_the_other_are_as_crashes_however_long_the_timeout() {
    let timeout = Duration::from_secs(10);
    let mut stage = Stage::new(Some(timeout));
    for is_cautious in [false, true] {
        let _server = stage.serve();
        let begun = Instant::now() - 3 * timeout;
        let supervisor = &mut stage.supervisor;
        supervisor.server.as_mut().unwrap().ready = Some(begun);
        supervisor.pulse.begin_anew(begun);
        supervisor.settle_pulse(begun + timeout);
        supervisor.settle_pulse(begun + 2 * timeout);
        stage.turn_until(|supervisor| supervisor.deaths.count > u64::from(is_cautious));
        assert_eq!(stage.supervisor.deaths.is_cautious(), is_cautious);
    }
}
