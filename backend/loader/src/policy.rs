//! What a module is allowed that an operator of another host might decide otherwise.

use crate::signature::TrustedKey;

/// Which modules a loader takes, beyond what has to be so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Libraries that a module may need, by their sonames.
    pub libraries: Vec<String>,
    /// If there are any: one of them has to have signed a module.
    pub trusted_keys: Vec<TrustedKey>,
}

/// The libraries that the host process has itself, and the C library's former parts.
const LIBRARIES: [&str; 8] = [
    "libgcc_s.so.1",
    "libc.so.6",
    "libm.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
];

impl Default for Policy {
    /// Libraries that the host process has itself: a module brings no other into it.
    fn default() -> Self {
        Self { libraries: LIBRARIES.map(str::to_owned).into(), trusted_keys: Vec::new() }
    }
}

impl Policy {
    pub(crate) fn allows(&self, library: &[u8]) -> bool {
        self.libraries.iter().any(|allowed| allowed.as_bytes() == library)
    }
}
