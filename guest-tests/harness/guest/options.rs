//! What a guest is.

use std::path::{Path, PathBuf};

use crate::debian::Debian;

/// What to boot. The defaults suit a disk with two queues.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    /// The disks: `vda`, `vdb` and so on, each served behind its vhost-user socket.
    pub vhost_sockets: Vec<PathBuf>,
    /// Virtqueues per disk.
    pub queues: u16,
    /// Entries per virtqueue, a power of two.
    pub queue_size: u16,
    /// The guest's memory.
    pub memory_mib: u32,
    /// Slots that memory can be added in, each as large as what is there from the start.
    pub memory_slots: u32,
    /// The guest's CPUs.
    pub smp: u32,
    /// Seconds after which QEMU reconnects to a backend that went away; without it, it does not.
    pub reconnect: Option<u32>,
    /// QEMU's `-machine`, without its memory.
    pub machine: String,
    /// Whose QEMU, and whose kernel.
    pub debian: Debian,
    /// The firmware loads what it finds on the disks, instead of a kernel that QEMU has loaded.
    pub boot_from_disk: bool,
    /// More arguments for QEMU.
    pub extra_args: Vec<String>,
}

impl Default for GuestOptions {
    fn default() -> Self {
        GuestOptions {
            vhost_sockets: Vec::new(),
            queues: 2,
            queue_size: 128,
            memory_mib: 512,
            memory_slots: 0,
            smp: 2,
            reconnect: None,
            machine: "q35".to_owned(),
            debian: Debian::chosen(),
            boot_from_disk: false,
            extra_args: Vec::new(),
        }
    }
}

impl GuestOptions {
    /// A guest with one disk, and the defaults for everything else.
    pub fn with_disk(vhost_socket: &Path) -> Self {
        GuestOptions { vhost_sockets: vec![vhost_socket.to_owned()], ..Self::default() }
    }
}
