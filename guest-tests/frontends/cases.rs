//! What is tried, in this order.

use crate::stage::Outcome;
use crate::{devices, firmware, libvirt, moves};

/// One row of the table.
pub struct Case {
    /// For the command line.
    pub name: &'static str,
    /// For people.
    pub what: &'static str,
    /// Panics with what did not hold.
    pub run: fn() -> Outcome,
}

/// All of them.
pub const CASES: &[Case] = &[
    Case { name: "linux", what: "boots, 2 queues; handovers", run: devices::linux },
    Case { name: "deep", what: "queues of 1024; swaps", run: devices::deep },
    Case { name: "polled", what: "queues that the guest polls", run: devices::polled },
    Case { name: "stop-cont", what: "QMP stop and cont", run: devices::stop_and_cont },
    Case { name: "reset", what: "the reset button", run: devices::reset },
    Case { name: "disk-plug", what: "a disk comes and goes", run: devices::disk_plug },
    Case { name: "memory-plug", what: "memory is added", run: devices::memory_plug },
    Case { name: "restart", what: "server killed, daemon restarted", run: devices::restart },
    Case { name: "seabios", what: "GRUB and Linux from the disk, BIOS", run: firmware::seabios },
    Case { name: "ovmf", what: "GRUB and Linux from the disk, UEFI", run: firmware::ovmf },
    Case { name: "libvirt", what: "define, attach, suspend, restart", run: libvirt::libvirt },
    Case { name: "migration", what: "live, two daemons, there and back", run: moves::migration },
    Case { name: "cpr-reboot", what: "QEMU's state through a file", run: moves::cpr_reboot },
    Case { name: "cpr-transfer", what: "a second QEMU takes over", run: moves::cpr_transfer },
    Case { name: "cpr-exec", what: "QEMU executes itself", run: moves::cpr_exec },
];
