//! Servers that cannot be started.

use super::*;
use control::messages::UpgradeDaemonRequest;
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
        // How long the guest has waited for the next one is told, and what for.
        assert!(supervisor.outage.is_some(), "{errno:?}");
        supervisor.tell_facts();
        let status = supervisor.front.as_ref().unwrap().status();
        assert_eq!(status["state"], "recovering");
        let why = format!("{}; it is tried again and again", std::io::Error::from(errno));
        assert_eq!(status["fault"], format!("cannot start a server: {why}"));
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
    supervisor.tell_facts();
    let status = supervisor.front.as_ref().unwrap().status();
    assert_eq!(status["state"], "faulted");
    let why = std::io::Error::from(Errno::ACCESS);
    assert_eq!(status["fault"], format!("cannot start a server: {why}"));
}

/// An operator asks for it without saying of which part, as the package does.
#[test]
fn another_program_brings_a_device_back_that_was_given_up() {
    for path in [None, Some("/bin/ls".into())] {
        let mut stage = Stage::new(None);
        let supervisor = &mut stage.supervisor;
        (0..10).for_each(|_| supervisor.cannot_start(&Errno::ACCESS.into()));
        assert!(supervisor.is_given_up);
        let ticket = supervisor.front.as_mut().unwrap().any_ticket();
        supervisor.upgrade_daemon(ticket, UpgradeDaemonRequest { path, only: None });
        assert!(!supervisor.is_given_up && supervisor.start_at.is_some());
    }
    // The supervisor alone is of no use.
    let mut stage = Stage::new(None);
    let supervisor = &mut stage.supervisor;
    (0..10).for_each(|_| supervisor.cannot_start(&Errno::ACCESS.into()));
    assert!(supervisor.unrest().is_some_and(|why| why.contains("--only server")));
}

/// Asked for twice, because the first answer is that it was not done.
#[test]
fn what_has_served_is_gone_back_to_if_a_program_for_an_outage_does_not() {
    let mut stage = Stage::new(None);
    let supervisor = &mut stage.supervisor;
    let before = supervisor.options.program.clone();
    supervisor.served = Some(before.clone());
    supervisor.cannot_start(&Errno::AGAIN.into());
    let other = Program::open(Path::new("/bin/ls")).unwrap();
    for _ in 0..2 {
        let ticket = supervisor.front.as_mut().unwrap().any_ticket();
        supervisor.begin_exchange(ticket, other.clone());
        assert_eq!(supervisor.options.program, other);
    }
    supervisor.cannot_start(&Errno::ACCESS.into());
    assert_eq!(supervisor.options.program, other);
    supervisor.cannot_start(&Errno::ACCESS.into());
    assert_eq!(supervisor.options.program, before);
}

/// A server of the program before is being started when the other one is asked for.
#[test]
fn deaths_of_another_program_do_not_count() {
    let mut stage = Stage::new(None);
    stage.supervisor.served = Some(stage.supervisor.options.program.clone());
    stage.supervisor.cannot_start(&Errno::ACCESS.into());
    let _played = stage.serve();
    stage.supervisor.server.as_mut().unwrap().ready = None;
    stage.supervisor.server.as_mut().unwrap().program = stage.supervisor.options.program.clone();
    let supervisor = &mut stage.supervisor;
    let other = Program::open(Path::new("/bin/ls")).unwrap();
    let ticket = supervisor.front.as_mut().unwrap().any_ticket();
    supervisor.begin_exchange(ticket, other.clone());
    supervisor.current_has_died(Ended::Exited(1));
    assert_eq!(supervisor.options.program, other);
    supervisor.server = None;
    supervisor.cannot_start(&Errno::ACCESS.into());
    assert_eq!(supervisor.options.program, other, "once more");
}

#[test]
fn what_is_no_program_is_refused() {
    let mut stage = Stage::new(None);
    let supervisor = &mut stage.supervisor;
    let before = supervisor.options.program.clone();
    for path in ["/etc/passwd", "/etc"] {
        let ticket = supervisor.front.as_mut().unwrap().any_ticket();
        let only = Some(control::messages::Part::Server);
        let request = UpgradeDaemonRequest { path: Some(path.into()), only };
        supervisor.upgrade_daemon(ticket, request);
        assert_eq!(supervisor.options.program, before, "{path}");
    }
}
