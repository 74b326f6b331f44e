//! The lines of OPERATING.md on NBD are run as they stand there, with folders of the test's own.

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::daemon::{binary, disk_directory};
use rustix::process::{Pid, Signal, kill_process};

/// The lines of the first block of the page's section.
fn lines() -> Vec<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../backend/OPERATING.md");
    let text = std::fs::read_to_string(page).expect("the page");
    let (_, section) = text.split_once("## Disks behind an NBD server").expect("the section");
    let (_, block) = section.split_once("```sh\n").expect("a block");
    let (block, _) = block.split_once("```").expect("its end");
    block.lines().map(str::to_owned).collect()
}

/// Ends with the test, however that ends.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = Pid::from_child(&self.0);
        let _ = kill_process(pid, Signal::TERM);
        let _ = self.0.wait();
    }
}

#[test]
fn what_the_page_says_works() {
    let folder = disk_directory();
    let at = folder.path().to_str().expect("UTF-8");
    let bin = binary("vhost-hotswap");
    let path = format!(
        "{}:{}",
        bin.parent().expect("a directory").display(),
        std::env::var("PATH").expect("a path")
    );
    let (mut daemon, mut commands) = (None, 0);
    for line in lines() {
        let line = line.replace("/srv/", &format!("{at}/")).replace("/run/", &format!("{at}/"));
        let mut command = Command::new("sh");
        command.env("PATH", &path).arg("-c");
        commands += 1;
        if let Some(line) = line.strip_suffix('&') {
            daemon = Some(Daemon(command.arg(format!("exec {line}")).spawn().expect("a shell")));
            let deadline = Instant::now() + PATIENCE;
            while !Path::new(&format!("{at}/vm1.sock.control")).exists() {
                assert!(Instant::now() < deadline, "`{line}` does not serve");
                std::thread::sleep(Duration::from_millis(5));
            }
            continue;
        }
        // qemu-nbd goes on beside the test, and ends with its process.
        let line = line.replace("--fork ", &format!("--fork --pid-file={at}/pid "));
        let output = command.arg(&line).output().expect("a shell");
        assert!(output.status.success(), "`{line}`: {}", String::from_utf8_lossy(&output.stderr));
        if line.contains("upgrade nbd") {
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(said.contains("by handover"), "{said}");
        }
    }
    assert!(commands >= 5, "{commands} lines");
    drop(daemon);
    let pid = std::fs::read_to_string(format!("{at}/pid")).expect("qemu-nbd's");
    let killed = Command::new("kill").arg(pid.trim()).status().expect("it runs");
    assert!(killed.success());
}
