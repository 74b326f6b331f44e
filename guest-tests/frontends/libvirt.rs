//! A guest that libvirt starts, with the disk of OPERATING.md as it stands there.
//!
//! libvirtd runs in the other Debian with processes and mounts of its own, which go with it.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::debian::Debian;
use guest_tests::guest::fio::Fio;
use guest_tests::guest::{Guest, Launch};

use crate::stage::{FileDisk, NotHere, Outcome, Upgrades, beside, finish, memory_disk, say};

/// The page with the XML.
const PAGE: &str = include_str!("../../backend/OPERATING.md");
/// What stands for the socket there.
const SOCKET: &str = "/run/vhost-hotswap/vm1.sock";

/// What libvirtd is started by: the other Debian with this system's devices and temporary files.
const START: &str = r#"
mount -t proc proc "$0/proc"
mount --rbind /sys "$0/sys"
mount --rbind /dev "$0/dev"
mount -t tmpfs tmpfs "$0/run"
mkdir -p "$0$1"
mount --bind "$1" "$0$1"
# Not with exec: the first process has to reap, which libvirtd does not do for QEMU.
chroot "$0" /usr/sbin/libvirtd --config "$2/libvirtd.conf" &
wait
"#;

/// No other user, no confinement: what is tried is the disk.
const QEMU_CONF: &str = r#"user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
remember_owner = 0
"#;

/// Defined, started, suspended, a disk attached and detached, the daemon restarted.
pub fn libvirt() -> Outcome {
    let debian = Debian::chosen();
    if !debian.is_elsewhere() || !debian.path("usr/sbin/libvirtd").exists() {
        return Err(NotHere("there is no libvirt in HOTSWAP_QEMU_ROOT".to_owned()));
    }
    let (mut first, second) = (FileDisk::new(), memory_disk());
    // Beside QEMU's own files, which only it knows.
    let directory = tempfile::tempdir().expect("a directory");
    let host = Host { debian: &debian, directory: directory.path() };
    let guest = Guest::boot_by(&debian, |launch| host.start(launch, first.daemon.socket()));
    let guest = guest.unwrap_or_else(|error| panic!("{error}"));

    let (count, report) = beside(&Upgrades::File(&first), || {
        let fio = Fio::start(&guest, 15);
        host.virsh(&["suspend", "tried"]);
        thread::sleep(Duration::from_millis(300));
        host.virsh(&["resume", "tried"]);
        let disk = host.file("disk.xml", &disk(second.socket(), "vdb"));
        host.virsh(&["attach-device", "tried", &disk, "--live"]);
        guest.sh("for i in $(seq 200); do [ -b /dev/vdb ] && exit; sleep 0.1; done; exit 1");
        beside(&Upgrades::Memory(&second), || Fio::start_on(&guest, "vdb", 3).finish());
        host.virsh(&["detach-device", "tried", &disk, "--live"]);
        guest.sh("for i in $(seq 300); do [ -b /dev/vdb ] || exit 0; sleep 0.1; done; exit 1");
        finish(&guest, fio)
    });
    let fio = Fio::start(&guest, 6);
    assert_eq!(first.daemon.stop().0, 0, "the daemon's exit code");
    first.daemon.start_again();
    finish(&guest, fio);
    let version = host.virsh(&["version", "--daemon"]);
    let version = version.lines().find_map(|line| line.strip_prefix("Running against daemon: "));
    host.virsh(&["destroy", "tried"]);
    host.virsh(&["undefine", "tried"]);
    Ok(format!("libvirt {}: {}", version.unwrap_or("of no version").trim(), say(count, &report)))
}

/// The XML of the page.
fn page() -> &'static str {
    let after = PAGE.split_once("```xml\n").expect("XML in OPERATING.md").1;
    after.split_once("```").expect("its end").0
}

/// The page's disk, at another socket and with another name.
fn disk(socket: &Path, name: &str) -> String {
    let begin = page().find("<disk").expect("a disk");
    let end = page().find("</disk>").expect("its end") + "</disk>".len();
    page()[begin..end].replace(SOCKET, &socket.display().to_string()).replace("vda", name)
}

/// A running libvirt.
struct Host<'a> {
    debian: &'a Debian,
    directory: &'a Path,
}

impl Host<'_> {
    /// Writes a file that libvirt can read, too; its path.
    fn file(&self, name: &str, text: &str) -> String {
        let path = self.directory.join(name);
        fs::write(&path, text).expect("a file");
        path.display().to_string()
    }

    fn try_virsh(&self, args: &[&str]) -> io::Result<(bool, String)> {
        let mut command = self.debian.program("virsh");
        let socket = self.directory.join("libvirt-sock");
        command.arg("--connect").arg(format!("qemu:///system?socket={}", socket.display()));
        let output = command.args(args).stdin(Stdio::null()).output()?;
        let said = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
    }

    fn virsh(&self, args: &[&str]) -> String {
        match self.try_virsh(args) {
            Ok((true, said)) => said,
            Ok((false, said)) => panic!("virsh {args:?}: {}", said.trim()),
            Err(error) => panic!("virsh: {error}"),
        }
    }

    /// Starts libvirt, and the guest.
    fn start(&self, launch: &Launch<'_>, socket: &Path) -> io::Result<Child> {
        fs::write(self.debian.path("etc/libvirt/qemu.conf"), QEMU_CONF)?;
        self.file(
            "libvirtd.conf",
            &format!(
                "unix_sock_dir = \"{0}\"\nauth_unix_rw = \"none\"\n\
                 log_outputs = \"3:file:{0}/libvirtd.log\"\n",
                self.directory.display()
            ),
        );
        let log = fs::File::create(launch.directory.join("qemu.log"))?;
        let mut child = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", START])
            .arg(self.debian.path(""))
            .arg(std::env::temp_dir())
            .arg(self.directory)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.try_virsh(&["uri"])?.0 {
            if Instant::now() > deadline || child.try_wait()?.is_some() {
                let _ = child.kill();
                let log = fs::read_to_string(self.directory.join("libvirtd.log"));
                let said = self.try_virsh(&["uri"])?.1;
                let log = log.unwrap_or_default();
                return Err(io::Error::other(format!("libvirtd does not answer: {said}{log}")));
            }
            thread::sleep(Duration::from_millis(100));
        }
        // Of a case that did not hold, before; there is none as a rule.
        let _ = self.try_virsh(&["undefine", "tried"])?;
        let xml = self.file("guest.xml", &self.guest(launch, socket)?);
        for command in [["define", xml.as_str()], ["start", "tried"]] {
            let (done, said) = self.try_virsh(&command)?;
            if !done {
                let _ = child.kill();
                return Err(io::Error::other(format!("virsh {command:?}: {said}")));
            }
        }
        Ok(child)
    }

    /// The page's guest, with what a guest needs beside its disk.
    fn guest(&self, launch: &Launch<'_>, socket: &Path) -> io::Result<String> {
        // libvirt sees the other Debian, and temporary files.
        let (kernel, initramfs) = (self.directory.join("kernel"), self.directory.join("initramfs"));
        fs::copy(&launch.boot_files.kernel, &kernel)?;
        fs::copy(&launch.boot_files.initramfs, &initramfs)?;
        let head = format!(
            "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>tried</name>
  <memory unit='MiB'>512</memory>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{}</kernel>
    <initrd>{}</initrd>
    <cmdline>{}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='allow'>Nehalem</model></cpu>",
            kernel.display(),
            initramfs.display(),
            launch.command_line()
        );
        let port = "<controller type='pci' model='pcie-root-port'/>".repeat(8);
        let tail = format!(
            "    <controller type='pci' index='0' model='pcie-root'/>{port}
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='{}'/></serial>
    <channel type='unix'>
      <source mode='connect' path='{}'/>
      <target type='virtio' name='agent'/>
    </channel>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-chardev'/><qemu:arg value='socket,id=ours,path={}'/>
    <qemu:arg value='-mon'/><qemu:arg value='chardev=ours,mode=control'/>
  </qemu:commandline>",
            launch.console().display(),
            launch.agent_socket().display(),
            launch.qmp_socket().display()
        );
        Ok(page()
            .replace("<domain type='kvm'>", &head)
            .replace("  </devices>", &tail)
            .replace(SOCKET, &socket.display().to_string()))
    }
}
