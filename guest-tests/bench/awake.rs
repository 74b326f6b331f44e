//! CPUs that do not fall asleep while something is measured that sleeps and is woken.
//!
//! Why: on an idle virtual machine a CPU is given back to the hypervisor, and to be woken there
//! takes 5 or 50 us, as its host pleases, for seconds at a time. Runs that are to be compared then
//! differ by more than what is compared. The kernel's PM QoS interface keeps idle CPUs looking for
//! work (`/dev/cpu_dma_latency`, Documentation/power/pm_qos_interface.rst), as long as the file is
//! open.

use std::fs::File;
use std::io::Write;

/// As long as it lives, CPUs stay awake.
#[derive(Debug)]
pub(super) struct Awake(Option<File>);

impl Awake {
    /// Keeps them awake, if that is allowed.
    pub(super) fn keep() -> Awake {
        let file = File::options().write(true).open("/dev/cpu_dma_latency");
        // A latency of 0 us is asked for, as a native 32-bit number.
        Awake(file.and_then(|mut file| file.write_all(&0_i32.to_ne_bytes()).map(|()| file)).ok())
    }

    /// For the reader.
    pub(super) const fn describe(&self) -> &'static str {
        if self.0.is_some() {
            "CPUs kept awake"
        } else {
            "CPUs may sleep (no access to /dev/cpu_dma_latency)"
        }
    }
}
