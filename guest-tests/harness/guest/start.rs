//! Starts QEMU, and takes the connections that it makes.

use std::fs::{self, File};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::options::GuestOptions;
use super::qmp::Qmp;
use crate::PATIENCE;
use crate::initramfs;

/// Mitigations flush translations that TCG then has to make again, and they guard nothing here; nor
/// do the kernel's tests of its ciphers. A guest that does not answer is sent an NMI, which has its
/// kernel say what it does: all tasks (1), all processors (64), and its log from the start (32).
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=4 rdinit=/init \
                                   random.trust_cpu=on panic=0 mitigations=off cryptomgr.notests \
                                   unknown_nmi_panic panic_print=97";

/// Under TCG the guest mistrusts its TSC and reads the HPET instead, at the price of a device
/// access for every look at the clock: fio then does half the I/O. And where the host is busy, it
/// finds no tick of its timer in time, and gives up ("IO-APIC + timer doesn't work"). The other
/// processors come when the devices are there, see the guest's `init`.
const TCG_COMMAND_LINE: &str = "tsc=reliable clocksource=tsc no_timer_check maxcpus=1";

/// What a QEMU that is started for a guest has to know.
pub struct Launch<'a> {
    /// For its files. It connects to [`agent_socket`](Self::agent_socket) with a virtio-serial port
    /// named `agent`, and to [`qmp_socket`](Self::qmp_socket) with a monitor.
    pub directory: &'a Path,
    /// The kernel and the initramfs.
    pub boot_files: &'a initramfs::BootFiles,
}

impl Launch<'_> {
    /// Where the guest's agent is to be connected to.
    pub fn agent_socket(&self) -> PathBuf {
        self.directory.join("agent.sock")
    }

    /// Where a monitor is to be connected to.
    pub fn qmp_socket(&self) -> PathBuf {
        self.directory.join("qmp.sock")
    }

    /// The file for the guest's serial console.
    pub fn console(&self) -> PathBuf {
        self.directory.join("console.log")
    }

    /// The kernel's command line.
    pub fn command_line(&self) -> String {
        if kvm_is_usable() {
            KERNEL_COMMAND_LINE.to_owned()
        } else {
            format!("{KERNEL_COMMAND_LINE} {TCG_COMMAND_LINE}")
        }
    }
}

/// Has QEMU started and takes the two connections that it makes to us. We listen and it connects,
/// so there is no moment at which a socket is not there yet.
pub(super) fn start(
    launch: &Launch<'_>,
    spawn: impl FnOnce(&Launch<'_>) -> io::Result<Child>,
) -> io::Result<(Child, UnixStream, Qmp)> {
    let sockets = Sockets::listen(launch)?;
    // From here on, an error must not leave the process behind.
    let mut child = KillOnDrop(Some(spawn(launch)?));
    let qemu = child.0.as_mut().ok_or_else(|| io::Error::other("QEMU is gone"))?;
    let (agent, qmp) = sockets.accept(qemu)?;
    let child = child.0.take().ok_or_else(|| io::Error::other("QEMU is gone"))?;
    Ok((child, agent, qmp))
}

/// What a QEMU is to connect to.
pub(super) struct Sockets {
    agent: UnixListener,
    qmp: UnixListener,
}

impl Sockets {
    /// Listens, in the place of what has listened there before.
    pub(super) fn listen(launch: &Launch<'_>) -> io::Result<Self> {
        let listen = |path: PathBuf| {
            let _ = fs::remove_file(&path);
            UnixListener::bind(path)
        };
        Ok(Sockets { agent: listen(launch.agent_socket())?, qmp: listen(launch.qmp_socket())? })
    }

    /// Takes both connections.
    pub(super) fn accept(self, qemu: &mut Child) -> io::Result<(UnixStream, Qmp)> {
        let agent = accept(&self.agent, qemu)?;
        let qmp = accept(&self.qmp, qemu)?;
        Ok((agent, Qmp::new(qmp)?))
    }
}

/// Starts the QEMU that the options describe.
pub(super) fn spawn(options: &GuestOptions, launch: &Launch<'_>) -> io::Result<Child> {
    let mut command = options.debian.qemu();
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-machine", &format!("{},memory-backend=mem", options.machine)]);
    if kvm_is_usable() {
        command.args(["-accel", "kvm", "-cpu", "host"]);
    } else {
        // The more features an emulated CPU has, the more a kernel sets up: "max" boots 2 s later.
        command.args(["-accel", "tcg,thread=multi", "-cpu", "Nehalem"]);
    }
    command.arg("-object");
    command.arg(format!("memory-backend-memfd,id=mem,size={}M,share=on", options.memory_mib));
    let (memory, slots) = (options.memory_mib, options.memory_slots);
    let more = match slots {
        0 => String::new(),
        _ => format!(",slots={slots},maxmem={}M", memory * (slots + 1)),
    };
    command.args(["-m", &format!("{memory}M{more}"), "-smp", &options.smp.to_string()]);
    if !options.boot_from_disk {
        let files = launch.boot_files;
        command.arg("-kernel").arg(&files.kernel).arg("-initrd").arg(&files.initramfs);
        command.args(["-append", &launch.command_line()]);
    }
    command.arg("-serial").arg(format!("file:{}", launch.console().display()));
    command.args([
        "-device",
        "virtio-serial-pci",
        "-device",
        "virtserialport,chardev=agent,name=agent",
    ]);
    command
        .arg("-chardev")
        .arg(format!("socket,id=agent,path={}", launch.agent_socket().display()));
    command.arg("-chardev").arg(format!("socket,id=qmp,path={}", launch.qmp_socket().display()));
    command.args(["-mon", "chardev=qmp,mode=control"]);
    for (index, socket) in options.vhost_sockets.iter().enumerate() {
        let reconnect =
            options.reconnect.map(|seconds| options.debian.reconnect(seconds)).unwrap_or_default();
        command
            .arg("-chardev")
            .arg(format!("socket,id=disk{index},path={}{reconnect}", socket.display()));
        command.arg("-device").arg(format!(
            "vhost-user-blk-pci,id=vd{index},chardev=disk{index},num-queues={},queue-size={}",
            options.queues, options.queue_size
        ));
    }
    command.args(&options.extra_args);
    let log = File::create(launch.directory.join("qemu.log"))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()
}

struct KillOnDrop(Option<Child>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Accepts the connection of a QEMU that may also die of a wrong argument before it connects.
fn accept(listener: &UnixListener, qemu: &mut Child) -> io::Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if let Some(status) = qemu.try_wait()? {
            return Err(io::Error::other(format!("it exited with {status}")));
        }
        if Instant::now() > deadline {
            return Err(io::Error::other("it did not connect to us within 30 s"));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A `/dev/kvm` alone proves nothing: it also exists where the CPU offers no virtualization.
fn kvm_is_usable() -> bool {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let virtualizes = cpus.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    virtualizes && File::options().read(true).write(true).open("/dev/kvm").is_ok()
}
