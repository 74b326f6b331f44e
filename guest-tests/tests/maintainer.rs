//! The package's scripts, with a `systemctl` and a `hotswapctl` that write down what they are told.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// A root that has what the scripts look at.
struct Root(TempDir);

/// What a script has said, and what it has told others, one a line.
struct Ran {
    status: i32,
    said: String,
    told: Vec<String>,
}

impl Root {
    /// With these commands: what a shell script does for each.
    fn new(systemctl: &str, hotswapctl: &str) -> Root {
        let root = TempDir::new().expect("a directory");
        for directory in ["bin", "proc", "run/systemd/system", "etc"] {
            fs::create_dir_all(root.path().join(directory)).expect("a directory");
        }
        for (name, does) in [
            ("systemctl", systemctl),
            ("hotswapctl", hotswapctl),
            ("install", ""),
            ("systemd-sysusers", ""),
        ] {
            let path = root.path().join("bin").join(name);
            let script = format!("#!/bin/sh\necho {name} \"$@\" >>\"$ROOT/told\"\n{does}\n");
            fs::write(&path, script).expect("a script");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("its mode");
        }
        Root(root)
    }

    /// A daemon that was started by hand.
    fn runs_by_hand(self) -> Root {
        let directory = self.0.path().join("proc/4711");
        fs::create_dir(&directory).expect("a directory");
        symlink("/usr/bin/vhost-hotswap", directory.join("exe")).expect("a link");
        fs::write(directory.join("cmdline"), "vhost-hotswap\0").expect("a file");
        self
    }

    fn run(&self, script: &str, args: &[&str]) -> Ran {
        let path = Path::new("../backend/package/maintainer").join(script);
        let mut text = fs::read_to_string(path).expect("the script");
        let root = self.0.path().to_str().expect("UTF-8");
        for here in ["/run/", "/proc/", "/etc/"] {
            text = text.replace(here, &format!("{root}{here}"));
        }
        let path = format!("{root}/bin:{}", std::env::var("PATH").expect("a path"));
        let _ = fs::remove_file(self.0.path().join("told"));
        let output = Command::new("sh")
            .args(["-c", &text, script])
            .args(args)
            .envs([("ROOT", root), ("PATH", &path)])
            .output()
            .expect("a shell");
        let told = fs::read_to_string(self.0.path().join("told")).unwrap_or_default();
        let said = [output.stdout, output.stderr].concat();
        Ran {
            status: output.status.code().expect("a status"),
            said: String::from_utf8(said).expect("UTF-8"),
            told: told.lines().map(ToOwned::to_owned).collect(),
        }
    }
}

impl Ran {
    fn has_told(&self, what: &str) -> bool {
        self.told.iter().any(|told| told.contains(what))
    }
}

/// An idle disk that a frontend can start, and one in memory that systemd keeps.
const IDLE: &str = r#"case "$*" in
*list-units*--all*) echo "vhost-hotswap@ram.service loaded inactive dead x" ;;
*list-units*.socket*) echo "vhost-hotswap@vm1.socket loaded active listening x" ;;
*list-units*)
    # A frontend has come before its socket was stopped.
    [ ! -e "$ROOT/comes" ] || ! grep -q stop "$ROOT/told" ||
        echo "vhost-hotswap@vm1.service loaded active running x" ;;
*NFileDescriptorStore*) echo 3 ;;
esac"#;

#[test]
fn a_removal_that_is_refused_changes_nothing() {
    let root = Root::new(IDLE, "").runs_by_hand();
    let ran = root.run("prerm", &["remove"]);
    assert_eq!(ran.status, 1, "{}", ran.said);
    assert!(ran.said.contains("process-4711"), "{}", ran.said);
    assert!(!ran.has_told("stop") && !ran.has_told("clean"), "{:?}", ran.told);
    let root = Root::new(IDLE, "");
    let ran = root.run("prerm", &["remove"]);
    assert_eq!(ran.status, 0, "{}", ran.said);
    assert!(ran.has_told("stop vhost-hotswap@vm1.socket"), "{:?}", ran.told);
    assert!(ran.has_told("clean --what=fdstore vhost-hotswap@ram.service"), "{:?}", ran.told);
}

#[test]
fn a_frontend_that_comes_meanwhile_has_the_removal_refused_and_the_sockets_started() {
    let root = Root::new(IDLE, "");
    fs::write(root.0.path().join("comes"), "").expect("a file");
    let ran = root.run("prerm", &["remove"]);
    assert_eq!(ran.status, 1, "{}", ran.said);
    assert!(ran.said.contains("vhost-hotswap@vm1.service"), "{}", ran.said);
    assert!(!ran.has_told("clean"), "{:?}", ran.told);
    let back = root.run("postinst", &["abort-remove"]);
    assert!(back.has_told("start vhost-hotswap@vm1.socket"), "{:?}", back.told);
    assert_eq!(root.run("postinst", &["abort-remove"]).told, [""; 0], "once");
}

/// Of a unit that is required the stop is one's own.
#[test]
fn a_disk_is_not_stopped_with_its_socket() {
    let unit = fs::read_to_string("../backend/package/units/vhost-hotswap@.service");
    let unit = unit.expect("the unit");
    for line in unit.lines() {
        let binds = ["Requires=", "BindsTo=", "PartOf="].iter().any(|word| line.starts_with(word));
        assert!(!binds || !line.contains(".socket"), "{line}");
    }
    assert!(unit.contains("\nWants=vhost-hotswap@%i.socket\n"));
}

/// Three disks that are active, and one that systemd tries to start for ever.
const ACTIVE: &str = r#"case "$*" in
*list-units*)
    case "$*" in *activating*) echo "vhost-hotswap@vm0.service loaded activating auto-restart x" ;; esac
    for name in vm1 vm2 vm3; do echo "vhost-hotswap@$name.service loaded active running x"; done ;;
esac"#;

#[test]
fn only_a_disk_that_answers_can_stop_the_upgrade_of_the_others() {
    let answers = |refuses: &str| {
        format!(
            "case \"$*\" in *vm0*|*vm1*) echo cannot connect; exit 1 ;; \
             *{refuses}*upgrade-daemon) echo refused; exit 1 ;; esac"
        )
    };
    let upgraded = |ran: &Ran| {
        let told = ran.told.iter().filter(|told| told.contains("upgrade-daemon"));
        told.map(|told| told.split('/').rev().nth(1).expect("a name").to_owned())
            .collect::<Vec<_>>()
    };
    let ran = Root::new(ACTIVE, &answers("none")).run("postinst", &["configure", "0.1"]);
    assert_eq!((ran.status, upgraded(&ran)), (0, vec!["vm2".to_owned(), "vm3".to_owned()]));
    assert!(ran.said.contains("vm1: passed over"), "{}", ran.said);
    assert!(!ran.said.contains("vm0"), "{}", ran.said);
    let ran = Root::new(ACTIVE, &answers("vm2")).run("postinst", &["configure", "0.1"]);
    assert_eq!((ran.status, upgraded(&ran)), (0, vec!["vm2".to_owned()]));
    assert!(ran.said.contains("not tried then: vm3"), "{}", ran.said);
}

#[test]
fn what_one_disk_refuses_for_itself_does_not_stop_the_others() {
    let upgraded = |ran: &Ran| {
        let said = ran.said.lines().find(|line| line.contains("upgraded under their guests"));
        said.map(|line| line.rsplit(':').next().expect("names").trim().to_owned())
    };
    let all = |what: &str| {
        let answers = format!("case \"$*\" in *upgrade-daemon) {what} ;; esac");
        Root::new(ACTIVE, &answers).run("postinst", &["configure", "0.1"])
    };
    for code in ["no_supervisor", "no_server", "timeout", "exchange_failed", "state_refused"] {
        let ran = all(&format!("case \"$*\" in *vm1*) echo \"no ({code})\"; exit 1 ;; esac"));
        assert_eq!(upgraded(&ran).as_deref(), Some("vm2 vm3"), "{code}: {}", ran.said);
        assert!(ran.said.contains("see their logs: vm1"), "{code}: {}", ran.said);
    }
    let ran = all("case \"$*\" in *vm1*) echo 'no (of a later release)'; exit 1 ;; esac");
    assert_eq!(upgraded(&ran), None, "{}", ran.said);
    assert!(ran.said.contains("refused by vm1; not tried then: vm2 vm3"), "{}", ran.said);
    // What a second disk says as well is the program's.
    for code in ["program_unusable", "program_silent", "state_refused", "exchange_failed"] {
        let ran = all(&format!("echo 'no ({code})'; exit 1"));
        assert_eq!(upgraded(&ran), None, "{code}: {}", ran.said);
        assert!(ran.said.contains("refused by vm2; not tried then: vm3"), "{}", ran.said);
    }
    // What is under way is over in a moment.
    let ran = all("case \"$*\" in *vm1*) [ -e \"$ROOT/asked\" ] || \
         { : >\"$ROOT/asked\"; echo 'no (exchange_runs)'; exit 1; } ;; esac");
    assert_eq!(upgraded(&ran).as_deref(), Some("vm1 vm2 vm3"), "{}", ran.said);
}

/// Both of a host's shutdown.
#[test]
fn guests_end_before_their_disks_and_disks_have_time_for_it() {
    let unit = fs::read_to_string("../backend/package/units/vhost-hotswap@.service");
    let unit = unit.expect("the unit");
    assert!(unit.contains("\nBefore=libvirt-guests.service\n"));
    let has = unit.lines().find_map(|line| line.strip_prefix("TimeoutStopSec="));
    let has: u64 = has.expect("a bound").parse().expect("seconds");
    let ending = fs::read_to_string("../backend/supervisor/src/supervisor/ending.rs");
    let ending = ending.expect("the source");
    let bound = ending.lines().find_map(|line| {
        line.strip_prefix("const END_PATIENCE: Duration = Duration::from_secs(")?.strip_suffix(");")
    });
    let bound: u64 = bound.expect("the daemon's own bound").parse().expect("seconds");
    assert!(has > 2 * bound, "{has} s for an exchange that is undone and an end, {bound} s each");
}
