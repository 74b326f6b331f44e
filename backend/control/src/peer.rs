//! Who may command the daemon: root and the daemon's own user, as the kernel knows them.
//!
//! Only the user counts, but for processes that are named: a supervisor names its servers, in which
//! modules run. A process of another PID namespace has no number here (the kernel says 0), and may
//! command all the same: in a container the operator's programs are usually outside.
//!
//! A user namespace has numbers for some users only. All others, and so the host's root as well,
//! have one number in common: that of `/proc/sys/kernel/overflowuid`, 65534 as a rule. It says
//! nothing about which user it is, so no user may command by it, not even if the daemon's own user
//! has that number. A user without a number here can become one that has: the user that the daemon
//! runs as, seen from outside (`setpriv --reuid`), or by entering the namespace (`nsenter --user`).

use rustix::process::geteuid;
use std::fs;
use std::os::unix::net::UnixStream;

use crate::code::Code;
use crate::credentials::{Peer, peer};
use crate::rpc::RpcError;

/// How many users there are, each of which has a number in the first namespace.
const ALL_USERS: u64 = u32::MAX as u64;

/// Who may command.
#[derive(Debug, Clone, Copy)]
pub struct Commanders {
    /// The daemon's own user.
    own: u32,
    /// The number that stands for all users without one, if there are such.
    overflow: Option<u32>,
}

impl Commanders {
    /// Those of this process, in its user namespace.
    pub fn of_this_process() -> Commanders {
        // A map that cannot be read is taken to say that there are users without a number.
        let all = fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| maps_all(&map));
        let read_overflow = || {
            let number = fs::read_to_string("/proc/sys/kernel/overflowuid").ok();
            number.and_then(|number| number.trim().parse().ok()).unwrap_or(65534)
        };
        let (own, overflow) = (geteuid().as_raw(), (!all).then(read_overflow));
        if Some(own) == overflow {
            log::warn!(
                "only root may command this daemon: its user, {own}, may be any user without a number in its user namespace"
            );
        }
        Commanders { own, overflow }
    }

    /// Whether the peer is one of them; if not, why.
    pub fn check(self, stream: &UnixStream) -> Result<(), RpcError> {
        self.check_but(stream, |_| false)
    }

    /// The same, where a process of this number `is_barred`, whatever its user.
    pub fn check_but(
        self,
        stream: &UnixStream,
        is_barred: impl Fn(u32) -> bool,
    ) -> Result<(), RpcError> {
        let refused = |message: String| Err(RpcError::new(Code::PermissionDenied, message));
        let Peer { pid, uid } = match peer(stream) {
            Ok(peer) => peer,
            Err(e) => return refused(format!("the daemon cannot tell who you are: {e}")),
        };
        if let Some(pid) = pid.filter(|pid| is_barred(*pid)) {
            log::warn!("process {pid}, a server of this daemon, may not command it");
            return refused("a server of this daemon may not command it".to_owned());
        }
        if self.include(uid) {
            return Ok(());
        }
        let who = pid.map_or_else(
            || "a process of another PID namespace".to_owned(),
            |pid| format!("process {pid}"),
        );
        log::warn!("{who}, of user {uid}, may not command this daemon");
        refused(if Some(uid) == self.overflow {
            "the daemon cannot tell who you are: you have no number in its user namespace; be the user that it runs as"
                .to_owned()
        } else {
            "only root and the daemon's own user may command it".to_owned()
        })
    }

    fn include(self, uid: u32) -> bool {
        Some(uid) != self.overflow && (uid == 0 || uid == self.own)
    }
}

/// Whether every user has a number of his own (`user_namespaces(7)`: inside, outside, how many).
fn maps_all(map: &str) -> bool {
    let counts = map.lines().map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
    counts.sum::<Option<u64>>().is_some_and(|users| users >= ALL_USERS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_and_the_own_user_are_included() {
        let first = Commanders { own: 1000, overflow: None };
        assert_eq!(
            [0, 1000, 1001, 65534].map(|uid| first.include(uid)),
            [true, true, false, false]
        );
        let the_overflow_user = Commanders { own: 65534, overflow: None };
        assert_eq!([0, 65534, 1].map(|uid| the_overflow_user.include(uid)), [true, true, false]);
    }

    #[test]
    fn a_process_that_is_barred_is_refused_whatever_its_user() {
        let (one, _other) = UnixStream::pair().unwrap();
        let commanders = Commanders::of_this_process();
        assert!(commanders.check(&one).is_ok());
        let own = std::process::id();
        assert!(commanders.check_but(&one, |pid| pid != own).is_ok());
        let refused = commanders.check_but(&one, |pid| pid == own).unwrap_err();
        assert!(format!("{refused:?}").contains(Code::PermissionDenied.as_str()), "{refused:?}");
    }

    #[test]
    fn the_number_of_users_without_one_is_never_included() {
        for own in [0, 1000, 65534] {
            let within = Commanders { own, overflow: Some(65534) };
            assert!(within.include(0) && !within.include(65534), "{own}");
        }
        // The kernel lets an administrator choose it.
        assert!(!Commanders { own: 1000, overflow: Some(0) }.include(0));
    }

    #[test]
    fn a_map_of_some_users_is_not_one_of_all() {
        assert!(maps_all("         0          0 4294967295\n"));
        assert!(maps_all("0 100000 1\n1 1 4294967294\n"));
        for some in ["", "0 1000 1\n", "0 100000 65536\n", "nonsense\n", "0 0 all\n"] {
            assert!(!maps_all(some), "{some:?}");
        }
    }
}
