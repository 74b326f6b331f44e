//! The lines of OPERATING.md on Ceph are run as they stand there, with folders of the test's own.
//! `scripts/try-ceph` runs this; it is ignored elsewhere, because it needs a cluster.

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use guest_tests::PATIENCE;
use guest_tests::ceph::Ceph;
use guest_tests::daemon::{binary, disk_directory};
use rustix::process::{Pid, Signal, kill_process};

/// Ends with the test, however that ends.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.0), Signal::TERM);
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs a Ceph: scripts/try-ceph"]
fn what_the_page_says_works() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../backend/OPERATING.md");
    let text = std::fs::read_to_string(page).expect("the page");
    let (_, section) = text.split_once("## Disks in Ceph").expect("the section");
    let (_, block) = section.split_once("```sh\n").expect("a block");
    let (block, _) = block.split_once("```").expect("its end");
    let ceph = Ceph::given();
    // One of this name, in case that an earlier test has not ended well.
    drop(ceph.image("vm1", 1));
    let folder = disk_directory();
    let at = folder.path().to_str().expect("UTF-8");
    let bin = binary("vhost-hotswap");
    let path = format!(
        "{}:{}",
        bin.parent().expect("a directory").display(),
        std::env::var("PATH").expect("a path")
    );
    let keyring = format!("{}/client.", ceph.folder().display());
    let (mut daemon, mut commands) = (None, 0);
    for line in block.lines() {
        let line =
            line.replace("/etc/ceph/ceph.client.", &keyring).replace("/run/", &format!("{at}/"));
        let mut command = Command::new("sh");
        command.env("PATH", &path).env("CEPH_CONF", ceph.conf()).arg("-c");
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
        let output = command.arg(&line).output().expect("a shell");
        assert!(output.status.success(), "`{line}`: {}", String::from_utf8_lossy(&output.stderr));
        if line.contains("upgrade rbd") {
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(said.contains("by swap"), "{said}");
        }
    }
    assert!(commands >= 5, "{commands} lines");
    drop(daemon);
    let info = ceph.run("rbd info rbd/vm1");
    assert!(info.contains("size 80 GiB"), "{info}");
    ceph.run("rbd rm --no-progress rbd/vm1");
}
