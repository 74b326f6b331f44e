//! No ring runs before the disk's data is claimed, and when none runs any more it is given back.
//!
//! The frontend's messages do not wait for another program: the rings do. So a guest that comes by
//! migration gets its answers while the daemon that it comes from still serves it, and a stop is
//! answered at once.

use crate::log_limit;
use crate::sync::lock;
use log::Level;
use proxy::{Claimed, DomainProxy};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// How often a claim is tried again.
const TRY_EVERY: Duration = Duration::from_millis(5);

/// How long rings may wait before the log says so, and between two such lines.
const TO_SAY_SO: Duration = Duration::from_secs(if cfg!(test) { 0 } else { 2 });

/// How long a frontend waits at most for what was written to be durable, when its last ring stops.
/// It takes longer where the storage hangs; what is not given back is waited for by others.
const TO_GIVE_BACK: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Rings {
    /// Those that run, or are to, a bit each.
    running: u64,
    /// A thread tries to claim for them.
    is_tried: bool,
    /// How often one has started.
    starts: u64,
}

/// The claim of one session.
pub(super) struct SessionClaim {
    proxy: Arc<DomainProxy>,
    is_ours: AtomicBool,
    rings: Mutex<Rings>,
}

impl SessionClaim {
    pub(super) fn new(proxy: &Arc<DomainProxy>) -> Arc<Self> {
        let (is_ours, rings) = (AtomicBool::new(false), Mutex::default());
        Arc::new(Self { proxy: Arc::clone(proxy), is_ours, rings })
    }

    /// Whether rings may run.
    #[inline]
    pub(super) fn is_ours(&self) -> bool {
        // Acquire pairs with the Release below: what is read of the disk is read after the claim.
        self.is_ours.load(Ordering::Acquire)
    }

    /// The ring of `queue` is to run. If that has to wait, `wake` is called when it may.
    pub(super) fn ring_starts(
        self: &Arc<Self>,
        queue: usize,
        wake: impl FnOnce() + Send + 'static,
    ) {
        let mut rings = lock(&self.rings);
        let was_running = rings.running;
        rings.running |= 1 << queue;
        rings.starts += 1;
        if was_running == 0 {
            self.proxy.want_claim();
        }
        if self.is_ours() || rings.is_tried {
            return;
        }
        if self.proxy.claim(false) == Claimed::Yes {
            self.is_ours.store(true, Ordering::Release);
            return;
        }
        let claim = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("claim".to_owned()).spawn(move || {
            if claim.try_until_claimed() {
                wake();
            }
        });
        match spawned {
            Ok(_) => rings.is_tried = true,
            Err(error) => log::error!("no thread to claim the disk with: {error}"),
        }
    }

    /// Until it is ours, or no ring is to run any more. Returns whether it is.
    fn try_until_claimed(&self) -> bool {
        let started = Instant::now();
        loop {
            let claimed = self.proxy.claim(true);
            {
                let mut rings = lock(&self.rings);
                if rings.running == 0 || claimed == Claimed::Yes {
                    rings.is_tried = false;
                    let is_ours = rings.running != 0;
                    self.is_ours.store(is_ours, Ordering::Release);
                    drop(rings);
                    if !is_ours {
                        self.proxy.release_claim();
                    } else if started.elapsed() >= TO_SAY_SO {
                        log::info!("the disk is this daemon's now: the guest's rings run");
                    }
                    return is_ours;
                }
            }
            if started.elapsed() >= TO_SAY_SO {
                say_that_rings_wait(&claimed);
            }
            std::thread::sleep(TRY_EVERY);
        }
    }

    /// How often a ring has started: what was left before that is not what runs after it.
    pub(super) fn starts(&self) -> u64 {
        lock(&self.rings).starts
    }

    /// The ring of `queue` has stopped, with nothing in flight if it `is_clean`.
    pub(super) fn ring_stops(&self, queue: usize, is_clean: bool) {
        let mut rings = lock(&self.rings);
        if !is_clean {
            self.proxy.keep_claim();
        }
        let was_running = rings.running;
        rings.running &= !(1 << queue);
        if was_running == 0 || rings.running != 0 {
            return;
        }
        self.is_ours.store(false, Ordering::Release);
        self.proxy.give_back();
        drop(rings);
        if self.proxy.has_claimed() {
            self.release();
        }
    }

    fn release(&self) {
        let (done, is_done) = mpsc::channel::<()>();
        let proxy = Arc::clone(&self.proxy);
        let release = move || {
            proxy.release_claim();
            drop(done);
        };
        match std::thread::Builder::new().name("release".to_owned()).spawn(release) {
            // It ends by the sender's end, or by time.
            Ok(_) => drop(is_done.recv_timeout(TO_GIVE_BACK)),
            Err(error) => {
                log::warn!("no thread to give the disk back with: {error}");
                self.proxy.release_claim();
            }
        }
    }
}

fn say_that_rings_wait(claimed: &Claimed) {
    let why = match claimed {
        Claimed::NotNow(Some(why)) => why,
        Claimed::NotNow(None) => return,
        Claimed::Yes | Claimed::Taken => {
            "another program uses the disk's data. A guest that comes by migration is let go when the source has stopped it; otherwise end that program (`lslocks` may show which it is)"
        }
    };
    log_limit::say(Level::Warn, "not claimed", format_args!("the guest's rings wait: {why}"));
}
