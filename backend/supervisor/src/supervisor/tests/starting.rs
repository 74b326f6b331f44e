//! Servers that cannot be started.

use super::*;
use rustix::io::Errno;

/// A moment's shortage would else end in a disk that is faulted until somebody comes.
#[test]
fn a_shortage_is_no_death_of_a_module_or_of_a_program() {
    for errno in [Errno::AGAIN, Errno::NOMEM, Errno::MFILE, Errno::NFILE] {
        let mut stage = Stage::new(None);
        let supervisor = &mut stage.supervisor;
        supervisor.program_before = Some(scripted::program());
        let program = supervisor.options.program.clone();
        for _ in 0..20 {
            supervisor.start_at = None;
            let begun = Instant::now();
            supervisor.cannot_start(&errno.into());
            assert!(supervisor.start_at.is_some_and(|at| at > begun), "{errno:?}: without a pause");
        }
        assert_eq!(supervisor.deaths, Deaths::default(), "{errno:?}");
        assert!(!supervisor.is_given_up && supervisor.program_before.is_some(), "{errno:?}");
        assert_eq!(supervisor.options.program, program, "{errno:?}");
        // How long the guest has waited for the next one is told.
        assert!(supervisor.died_at.is_some(), "{errno:?}");
    }
}

/// It will not be another one by itself.
#[test]
fn a_program_that_cannot_be_run_is_replaced_and_in_the_end_given_up() {
    let mut stage = Stage::new(None);
    let supervisor = &mut stage.supervisor;
    supervisor.program_before = Some(scripted::program());
    let denied = || Errno::ACCESS.into();
    supervisor.cannot_start(&denied());
    assert!(supervisor.program_before.is_some());
    supervisor.cannot_start(&denied());
    assert!(supervisor.program_before.is_none(), "the one before goes on");
    (0..10).for_each(|_| supervisor.cannot_start(&denied()));
    assert!(supervisor.is_given_up);
}
