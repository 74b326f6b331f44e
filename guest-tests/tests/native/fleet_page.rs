//! What OPERATING.md and the package say of upgrading all disks of a host is run as it stands
//! there, with paths of the test's own and short trials.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use guest_tests::daemon::{Daemon, binary};

fn page(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../backend").join(name);
    std::fs::read_to_string(path).expect("the page")
}

/// The lines of the page's section, as one script.
fn script() -> String {
    let text = page("OPERATING.md");
    let (_, section) =
        text.split_once("### All disks of a host, and of a fleet").expect("the section");
    let (_, block) = section.split_once("```sh\n").expect("a block");
    block.split_once("```").expect("its end").0.to_owned()
}

/// Disks whose sockets are where the units have theirs.
struct Host {
    run: tempfile::TempDir,
    disks: Vec<Daemon>,
}

impl Host {
    fn start(domains: &[&str]) -> Self {
        let run = tempfile::tempdir().expect("a directory");
        let disks = domains.iter().enumerate().map(|(number, domain)| {
            let directory = run.path().join(format!("vm{number}"));
            std::fs::create_dir(&directory).expect("a directory");
            let control = directory.join("control");
            let control = control.to_str().expect("UTF-8");
            let daemon = Daemon::start(&["--domain", domain, "--param", "size=16M"]);
            std::os::unix::fs::symlink(daemon.control(), control).expect("a name");
            daemon
        });
        let disks = disks.collect();
        Self { run, disks }
    }

    fn path(&self) -> &str {
        self.run.path().to_str().expect("UTF-8")
    }

    fn generations(&self) -> Vec<u64> {
        self.disks.iter().map(|disk| disk.status()["generation"].as_u64().expect("it")).collect()
    }

    fn run(&self, command: &mut Command) -> Output {
        let bin = binary("hotswapctl");
        let bin = bin.parent().expect("a directory").display();
        let path = std::env::var("PATH").expect("a path");
        command.env("PATH", format!("{bin}:{path}")).output().expect("it runs")
    }
}

fn module() -> PathBuf {
    binary("libdomain_ramdisk_v2.so")
}

#[test]
fn all_disks_of_a_host_are_upgraded_or_none_if_one_would_refuse() {
    let run = |host: &Host| {
        let script = script()
            .replace("/usr/lib/vhost-hotswap/libdomain_mine.so", module().to_str().expect("UTF-8"))
            .replace("/run/vhost-hotswap", host.path())
            .replace("--canary 60", "--canary 1");
        host.run(Command::new("sh").args(["-c", &script]))
    };
    let host = Host::start(&["ramdisk", "ramdisk"]);
    let output = run(&host);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(host.generations(), [2, 2]);
    let host = Host::start(&["ramdisk", "empty", "ramdisk"]);
    let output = run(&host);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(host.generations(), [1, 1, 1]);
}

#[test]
fn the_playbook_does_the_same() {
    if Command::new("ansible-playbook").arg("--version").output().is_err() {
        println!("skipped: there is no ansible-playbook (pip: ansible-core)");
        return;
    }
    let run = |host: &Host| {
        let playbook =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../backend/package/examples/upgrade.yml");
        let vars = format!(
            "ansible_become=false ansible_python_interpreter=python3 canary=1 module={} run={}",
            module().display(),
            host.path()
        );
        host.run(
            Command::new("ansible-playbook")
                .args(["-i", "localhost,", "-c", "local", "-e", &vars])
                .arg(playbook),
        )
    };
    let host = Host::start(&["ramdisk", "ramdisk"]);
    let output = run(&host);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(host.generations(), [2, 2]);
    let host = Host::start(&["ramdisk", "empty"]);
    let output = run(&host);
    assert!(!output.status.success(), "{output:?}");
    assert_eq!(host.generations(), [1, 1]);
}
