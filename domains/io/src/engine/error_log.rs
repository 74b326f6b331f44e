//! What the operator hears of failing I/O: the first error of each class, and then one line a
//! minute.
//!
//! A full disk fails every write; a line for each would fill the next disk.

use domain_api::{Host, Level};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const PAUSE: Duration = Duration::from_secs(60);

/// Classes of errors that are counted by themselves.
const NO_SPACE: usize = 0;
const CUT_SHORT: usize = 1;
const OTHER: usize = 2;

/// The log of one instance.
#[derive(Debug)]
pub struct ErrorLog {
    host: Host,
    classes: [Throttle; 3],
}

#[derive(Debug, Default)]
struct Throttle {
    /// When a line may be written again, in nanoseconds of the host's clock.
    silent_until_ns: AtomicU64,
    /// Errors since the last line.
    unsaid: AtomicU64,
}

impl ErrorLog {
    pub(super) fn new(host: Host) -> Self {
        Self { host, classes: Default::default() }
    }

    /// Says that `what` failed, or counts it.
    pub fn report(&self, what: &str, error: &io::Error) {
        let (class, advice) = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                (NO_SPACE, "; make room in the image's file system")
            }
            io::ErrorKind::UnexpectedEof => {
                (CUT_SHORT, "; the image was cut short, restore its size")
            }
            io::ErrorKind::FileTooLarge => {
                (NO_SPACE, "; raise the limit of file sizes (`ulimit -f`, LimitFSIZE=)")
            }
            _ => (OTHER, ""),
        };
        let class = &self.classes[class];
        let now = self.host.clock();
        let now_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let until_ns = class.silent_until_ns.load(Ordering::Relaxed);
        let next_ns = u64::try_from((now + PAUSE).as_nanos()).unwrap_or(u64::MAX);
        // The thread that moves the date writes the line; Relaxed, because nothing else hangs on
        // it.
        let mine = now_ns >= until_ns
            && class
                .silent_until_ns
                .compare_exchange(until_ns, next_ns, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if !mine {
            class.unsaid.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let unsaid = class.unsaid.swap(0, Ordering::Relaxed);
        let more = if unsaid == 0 {
            String::new()
        } else {
            format!(" ({unsaid} more of the kind since the last line)")
        };
        self.host.log(Level::Warn, &format!("{what} failed: {error}{advice}{more}"));
    }
}
