//! What is tried, in this order.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use guest_tests::stamp::{Ledger, Load, LoadOptions, assert_intact};

use crate::host::{Disk, sh, try_sh, wait_until};

/// A disk in memory.
const MEMORY: Disk = Disk("memory");
/// One in a file.
const IMAGE: Disk = Disk("image");
const DISKS: [Disk; 2] = [MEMORY, IMAGE];
/// What systemd keeps of the first: its module, its data, the record. A standby is one more.
const ENTRIES: u64 = 3;
/// Requests of each load before and after what happens under it.
const SOME: u64 = 1000;

/// What the steps leave for each other.
pub struct Stage {
    directory: PathBuf,
    ledgers: [Option<Vec<Ledger>>; 2],
}

/// Something that is tried.
pub struct Step {
    /// In some words.
    pub what: &'static str,
    /// What it has to say when it held.
    pub run: fn(&mut Stage) -> String,
}

const fn step(what: &'static str, run: fn(&mut Stage) -> String) -> Step {
    Step { what, run }
}

/// All of them.
pub const STEPS: &[Step] = &[
    step("install", Stage::install),
    step("the commands of OPERATING.md", Stage::follow_the_page),
    step("two disks, by their sockets", Stage::begin),
    step("systemd's view of the units", Stage::look_at_units),
    step("a domain upgraded", Stage::upgrade_domain),
    step("package upgraded under load", Stage::upgrade_package),
    step("systemctl reload under load", Stage::reload),
    step("daemon-reload under load", Stage::daemon_reload),
    step("daemon-reexec under load", Stage::daemon_reexec),
    step("the server killed under load", Stage::kill_server),
    step("the supervisor killed", Stage::kill_supervisor),
    step("everything killed", Stage::kill_all),
    step("systemctl restart", Stage::restart),
    step("stop, start", Stage::stop_and_start),
    step("package with a broken daemon", Stage::upgrade_to_broken),
    step("restart with it, then repaired", Stage::restart_broken),
    step("remove while disks are served", Stage::remove_refused),
    step("stop, remove", Stage::remove),
    step("install again", Stage::reinstall),
    step("purge", Stage::purge),
];

impl Stage {
    /// With the packages in a directory.
    pub fn new(directory: PathBuf) -> Self {
        Stage { directory, ledgers: [None, None] }
    }

    fn deb(&self, name: &str) -> String {
        self.directory.join(format!("{name}.deb")).display().to_string()
    }

    /// Does something while both disks are under a load that checks every block.
    fn under_load<T>(&mut self, act: impl FnOnce(&Stage) -> T) -> T {
        let options = LoadOptions::new(2, 16);
        let begin = |at: usize| {
            let socket = DISKS[at].socket();
            match self.ledgers[at].clone() {
                None => Load::start(Path::new(&socket), &options),
                Some(ledgers) => Load::resume(Path::new(&socket), &options, ledgers),
            }
        };
        let loads = [begin(0), begin(1)];
        loads.iter().for_each(|load| load.wait_for(SOME));
        let result = act(self);
        for (at, load) in loads.into_iter().enumerate() {
            load.wait_for(SOME);
            let report = load.stop();
            report.assert_clean();
            self.ledgers[at] = Some(report.ledgers);
        }
        result
    }

    /// Both disks have what was written.
    fn assert_intact(&self) {
        for (disk, ledgers) in DISKS.iter().zip(&self.ledgers) {
            disk.serving();
            let ledgers = ledgers.as_deref().expect("it was written to");
            assert_intact(Path::new(&disk.socket()), ledgers);
        }
    }

    fn install(&mut self) -> String {
        // What an earlier run has left in a root that is kept.
        let _ = try_sh(
            "systemctl stop 'vhost-hotswap@*'; dpkg -P vhost-hotswap; \
             rm -rf /srv/disks /var/tmp/systemd-private-*-vhost-hotswap@*",
        );
        // What it depends on is here.
        sh(&format!("dpkg -i {}", self.deb("first")));
        sh("getent passwd vhost-hotswap");
        let active = sh("systemctl list-units --no-legend 'vhost-hotswap@*'");
        assert_eq!(active, "", "nothing is started");
        for man in ["vhost-hotswap.1", "hotswapctl.1", "hotswapctl-upgrade-daemon.1"] {
            let path = format!("/usr/share/man/man1/{man}.gz");
            // A minimal root is told to leave manuals out.
            let is_there = Path::new(&path).exists();
            assert!(is_there || Path::new("/etc/dpkg/dpkg.cfg.d/docker").exists(), "{path}");
        }
        let json = fs::read_to_string("/usr/share/qemu/vhost-user/50-vhost-hotswap.json");
        let json: serde_json::Value = serde_json::from_str(&json.expect("it is there")).unwrap();
        assert_eq!(json["type"], "block");
        let binary = json["binary"].as_str().expect("a path");
        let said = sh(&format!("{binary} --print-capabilities"));
        assert!(said.contains(r#""type": "block""#), "{said}");
        sh("dpkg-query -W vhost-hotswap")
    }

    fn follow_the_page(&mut self) -> String {
        let page = fs::read_to_string("/usr/share/doc/vhost-hotswap/OPERATING.md").expect("a page");
        let (_, section) = page.split_once("\n## As a service\n").expect("a section");
        let (_, block) = section.split_once("```sh\n").expect("commands");
        let (block, _) = block.split_once("```").expect("their end");
        File::create("/srv/vm1.img").and_then(|file| file.set_len(64 << 20)).unwrap();
        let disk = Disk("vm1");
        sh(&format!("set -e; {block}"));
        let status = disk.serving();
        assert_eq!(status["domain"]["params"]["serial"], "vm1-disk0", "{status}");
        sh("systemctl disable --now vhost-hotswap@vm1.socket vhost-hotswap@vm1.service");
        sh("rm /etc/vhost-hotswap/vm1.conf /srv/vm1.img");
        assert!(!Path::new(&disk.socket()).exists());
        format!("{} commands", block.lines().count())
    }

    fn begin(&mut self) -> String {
        sh("install -d -o vhost-hotswap /srv/disks");
        File::create("/srv/disks/image.img").and_then(|file| file.set_len(64 << 20)).unwrap();
        sh("chown vhost-hotswap /srv/disks/image.img");
        let configuration = [
            "OPTIONS=--domain ramdisk --param size=64M --queues 2 --serial memory-1\n",
            "OPTIONS=--blk-file /srv/disks/image.img --queues 2\n",
        ];
        for (disk, text) in DISKS.iter().zip(configuration) {
            fs::write(format!("/etc/vhost-hotswap/{}.conf", disk.0), text).unwrap();
            sh(&format!("systemctl enable --now vhost-hotswap@{}.socket", disk.0));
            assert_eq!(disk.property("ActiveState"), "inactive");
        }
        // The connection starts the daemon.
        self.under_load(|_| ());
        let stored = DISKS.map(|disk| {
            disk.serving();
            assert_eq!(disk.property("ActiveState"), "active");
            disk.stored()
        });
        assert_eq!(stored, [ENTRIES, 0]);
        let store = MEMORY.status()["supervisor"]["store"]["state"].clone();
        assert_eq!(
            (store, IMAGE.status()["supervisor"]["store"]["state"].clone()),
            ("held".into(), "not_needed".into())
        );
        let mode = sh("stat -c '%a %G' /run/vhost-hotswap/memory.sock");
        assert_eq!(mode, "660 kvm");
        format!("systemd keeps {} and {} descriptors", stored[0], stored[1])
    }

    fn look_at_units(&mut self) -> String {
        let (_, said) = try_sh("systemd-analyze verify vhost-hotswap@memory.service");
        let ours: Vec<&str> = said.lines().filter(|line| line.contains("vhost-hotswap")).collect();
        // The only key that Debian 12's does not know.
        let is_known = |line: &str| {
            // There is no `man` in a minimal root.
            ["FileDescriptorStorePreserve", "Command 'man ", "Can't show "]
                .iter()
                .any(|word| line.contains(word))
        };
        let strange = ours.iter().filter(|line| !is_known(line));
        assert_eq!(strange.count(), 0, "{said}");
        let exposure = sh("systemd-analyze security --no-pager vhost-hotswap@memory.service");
        let exposure = exposure.lines().last().unwrap_or_default().to_owned();
        let status = sh(&format!("cat /proc/{}/status", IMAGE.main_pid()));
        let line = |key: &str| status.lines().find(|line| line.starts_with(key)).map(str::to_owned);
        assert_eq!(line("NoNewPrivs").as_deref(), Some("NoNewPrivs:\t1"));
        assert_eq!(line("Seccomp:").as_deref(), Some("Seccomp:\t2"));
        assert_eq!(line("CapBnd").as_deref(), Some("CapBnd:\t0000000000000000"));
        exposure.trim_start_matches(|c: char| !c.is_ascii_alphabetic()).to_owned()
    }

    fn upgrade_domain(&mut self) -> String {
        self.under_load(|_| {
            let upgrade = |disk: Disk, to: &str| {
                let control = format!("/run/vhost-hotswap/{}/control", disk.0);
                sh(&format!("hotswapctl --control-path {control} upgrade {to} | head -n 1"))
            };
            let memory = upgrade(MEMORY, "ramdisk_v2");
            upgrade(IMAGE, "file");
            MEMORY.serving();
            assert_eq!(MEMORY.stored(), ENTRIES + 1, "the standby, too");
            memory
        })
    }

    /// The package is upgraded while it serves: what was said, and that nothing else has changed.
    fn upgrades_to(&mut self, name: &str) -> String {
        let before = DISKS.map(|disk| (disk.main_pid(), disk.serving(), disk.stored()));
        let said = self.under_load(|stage| sh(&format!("dpkg -i {}", stage.deb(name))));
        for (disk, (pid, status, stored)) in DISKS.iter().zip(before) {
            let now = disk.serving();
            assert_eq!((disk.main_pid(), disk.stored()), (pid, stored), "{}: {said}", disk.0);
            assert_eq!(now["generation"], status["generation"], "{}", disk.0);
            assert_eq!(disk.property("NRestarts"), "0");
        }
        said
    }

    fn upgrade_package(&mut self) -> String {
        let before = DISKS.map(|disk| disk.status()["server"]["pid"].clone());
        let said = self.upgrades_to("next");
        for (disk, before) in DISKS.iter().zip(before) {
            assert_ne!(disk.status()["server"]["pid"], before, "{said}");
            // Behind the directory that the root is.
            let is_new = |path: &String| path.ends_with("/usr/bin/vhost-hotswap");
            assert!(disk.programs().iter().all(is_new), "{:?}", disk.programs());
        }
        last_of(&said)
    }

    fn reload(&mut self) -> String {
        self.under_load(|_| {
            let before = DISKS.map(|disk| disk.status()["server"]["pid"].clone());
            sh("systemctl reload 'vhost-hotswap@*.service'");
            for (disk, before) in DISKS.iter().zip(before) {
                assert_ne!(disk.serving()["server"]["pid"], before, "it was exchanged");
            }
        });
        "both exchanged in place".to_owned()
    }

    fn daemon_reload(&mut self) -> String {
        self.keeps_the_store("systemctl daemon-reload && systemctl daemon-reload")
    }

    fn daemon_reexec(&mut self) -> String {
        self.keeps_the_store("systemctl daemon-reexec")
    }

    fn keeps_the_store(&mut self, command: &str) -> String {
        let before = MEMORY.stored();
        self.under_load(|_| sh(command));
        assert_eq!(MEMORY.stored(), before);
        self.assert_intact();
        format!("{before} descriptors before and after")
    }

    fn kill_server(&mut self) -> String {
        self.under_load(|_| {
            for disk in DISKS {
                let pid = disk.status()["server"]["pid"].as_u64().expect("a process");
                sh(&format!("kill -KILL {pid}"));
                let is_back =
                    || disk.status()["server"]["pid"].as_u64().is_some_and(|now| now != pid);
                wait_until("no recovery", is_back);
            }
        });
        "the loads went on, on their connections".to_owned()
    }

    /// The service is another process afterwards, with the same disk.
    fn comes_back_after(&mut self, act: impl Fn(Disk) -> String) -> String {
        self.under_load(|_| ());
        let generation = MEMORY.status()["generation"].clone();
        let before = MEMORY.stored();
        for disk in DISKS {
            let pid = disk.main_pid();
            sh(&act(disk));
            wait_until("it is not started again", || ![0, pid].contains(&disk.main_pid()));
        }
        self.assert_intact();
        let status = MEMORY.serving();
        assert_eq!(status["generation"], generation);
        assert_eq!(status["supervisor"]["store"]["lost"], serde_json::Value::Null);
        assert_eq!(MEMORY.stored(), before);
        format!("the disk in memory is intact, generation {generation}, {before} descriptors")
    }

    fn kill_supervisor(&mut self) -> String {
        self.comes_back_after(|disk| format!("kill -KILL {}", disk.main_pid()))
    }

    fn kill_all(&mut self) -> String {
        self.comes_back_after(|disk| format!("systemctl kill -s KILL {}", disk.unit()))
    }

    fn restart(&mut self) -> String {
        self.comes_back_after(|disk| format!("systemctl restart {}", disk.unit()))
    }

    /// Where systemd preserves its store, the disk in memory outlives that, too.
    fn stop_and_start(&mut self) -> String {
        sh("systemctl stop 'vhost-hotswap@*.socket' 'vhost-hotswap@*.service'");
        let is_preserved = MEMORY.property("FileDescriptorStorePreserve") == "yes";
        assert_eq!(MEMORY.stored() > 0, is_preserved);
        for disk in DISKS {
            sh(&format!("systemctl start vhost-hotswap@{}.socket {}", disk.0, disk.unit()));
        }
        if !is_preserved {
            self.ledgers[0] = None;
            self.under_load(|_| ());
        }
        self.assert_intact();
        let what = if is_preserved { "intact" } else { "lost: this systemd keeps nothing then" };
        format!("the disk in memory is {what}")
    }

    fn upgrade_to_broken(&mut self) -> String {
        let before = DISKS.map(|disk| (disk.main_pid(), disk.stored()));
        let said = self.under_load(|stage| sh(&format!("dpkg -i {}", stage.deb("broken"))));
        for (disk, before) in DISKS.iter().zip(before) {
            disk.serving();
            assert_eq!((disk.main_pid(), disk.stored()), before, "it serves as before");
        }
        assert!(said.contains("not upgraded, and served by the program before"), "{said}");
        assert!(said.contains("not tried then"), "it stops at the first: {said}");
        last_of(&said)
    }

    fn restart_broken(&mut self) -> String {
        let before = MEMORY.stored();
        let (works, _) = try_sh(&format!("systemctl restart {}", MEMORY.unit()));
        assert!(!works, "there is nothing that could start");
        let restarts = || MEMORY.property("NRestarts").parse::<u64>().expect("a number");
        wait_until("it is not tried again", || restarts() >= 6);
        let tries = restarts();
        let kept = MEMORY.stored();
        assert_eq!(kept, before, "while nothing runs");
        sh(&format!("dpkg -i {}", self.deb("repaired")));
        self.assert_intact();
        format!("after {tries} failed starts the disk in memory is intact")
    }

    fn remove_refused(&mut self) -> String {
        let said = self.under_load(|_| {
            let (works, said) = try_sh("dpkg -r vhost-hotswap");
            assert!(!works, "{said}");
            said
        });
        assert_eq!(sh("dpkg-query -f '${db:Status-Status}' -W vhost-hotswap"), "installed");
        let line = said.lines().find(|line| line.contains("are being served"));
        let line = line.unwrap_or_else(|| panic!("{said}"));
        assert!(DISKS.iter().all(|disk| line.contains(&disk.unit())), "{line}");
        line.to_owned()
    }

    fn remove(&mut self) -> String {
        sh("systemctl stop 'vhost-hotswap@*.socket' 'vhost-hotswap@*.service'");
        let said = sh("dpkg -r vhost-hotswap");
        assert!(!Path::new("/usr/bin/vhost-hotswap").exists());
        assert!(Path::new("/etc/vhost-hotswap/image.conf").exists(), "it is the administrator's");
        said.lines()
            .find(|line| line.contains("in memory"))
            .unwrap_or("nothing was left")
            .to_owned()
    }

    fn reinstall(&mut self) -> String {
        let said = sh(&format!("dpkg -i {}", self.deb("repaired")));
        for disk in DISKS {
            sh(&format!("systemctl start vhost-hotswap@{}.socket {}", disk.0, disk.unit()));
            disk.serving();
        }
        let ledgers = self.ledgers[1].take().expect("it was written to");
        assert_intact(Path::new(&IMAGE.socket()), &ledgers);
        assert_eq!(MEMORY.stored(), ENTRIES, "a new disk in memory: {said}");
        "the image is intact, the disk in memory is new".to_owned()
    }

    fn purge(&mut self) -> String {
        sh("systemctl stop 'vhost-hotswap@*.socket' 'vhost-hotswap@*.service'");
        sh("dpkg -P vhost-hotswap");
        let found = sh("find / -xdev -name '*hotswap*' -not -path '/proc/*' -not -path '/sys/*' \
                        -not -path '/var/tmp/try-package/*' -not -path '/var/log/*'; \
                        find /run -name '*hotswap*' -not -path '/run/systemd/*' -not -path '/run/log/*'");
        assert_eq!(found, "");
        assert!(!try_sh("getent passwd vhost-hotswap").0);
        assert!(!try_sh("getent group vhost-hotswap").0);
        "nothing is left".to_owned()
    }
}

/// The last thing that the package itself says.
fn last_of(said: &str) -> String {
    let ours = said.lines().rfind(|line| line.starts_with("vhost-hotswap: "));
    ours.unwrap_or("it said nothing").trim_start_matches("vhost-hotswap: ").to_owned()
}
