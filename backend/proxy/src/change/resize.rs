//! Another capacity, under the guest.
//!
//! ```text
//!   lock of changes -> larger? -> the domain grows what is behind it, and leaves the capacity in
//!     storage -> the record says so -> the device's capacity, which sessions go by -> the frontend
//! ```
//!
//! Invariants: the guest is never told of bytes that the live domain does not serve, nor held
//! against a capacity that it was not told; the device never becomes smaller. What is in storage is
//! what successors go by, so a standby follows, and a domain that dies in the middle of this leaves
//! one capacity or the other, not none.

use crate::change::refusals::preempted;
use crate::change::upgrade::Nothing;
use crate::claim::Claimed;
use crate::device::{DomainProxy, Others};
use crate::record::code::Code;
use crate::record::report::{Change, Options, Refusal, Resized};
use domain_host::CallError;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl DomainProxy {
    /// Makes the disk `capacity` bytes large, which is as large as it is, or larger.
    ///
    /// # Errors
    /// Why it was refused; the device is as it was.
    pub fn resize(self: &Arc<Self>, capacity: u64, options: Options) -> Result<Resized, Refusal> {
        let target = capacity.to_string();
        // Whether the standby of one on trial could follow is not known before, and not undone.
        let prepare = || self.canary.check_idle().map(|()| Nothing);
        let resized =
            self.recorded(Change::Resize, &target, options, prepare, |others, Nothing| {
                self.resize_live(others, capacity)
            })?;
        if resized.before != resized.capacity {
            // Without a lock: what is told may ask.
            self.config_changed();
        }
        Ok(resized)
    }

    fn resize_live(
        self: &Arc<Self>,
        others: &mut Others,
        capacity: u64,
    ) -> Result<Resized, Refusal> {
        let refused = |code, why: String| Err(Refusal::new(code, why));
        self.check_stopping()?;
        // If it has died and that is not known yet, the takeover comes first.
        self.notice_death();
        let Some(live) = self.live() else {
            let why = "nothing serves the disk, so that it cannot be resized; upgrade first";
            return refused(Code::ResizeFailed, why.to_owned());
        };
        if live.is_dead() {
            return Err(preempted());
        }
        let record = live.record();
        let (before, block_size) = (record.info.capacity, record.info.block_size);
        let generation = live.instance.generation();
        if capacity < before {
            return refused(
                Code::ResizeShrinks,
                format!(
                    "the guest was told of {before} bytes, and {capacity} are fewer; a disk is not made smaller under a guest that may use what would go"
                ),
            );
        }
        if !capacity.is_multiple_of(u64::from(block_size)) {
            return refused(
                Code::ResizeFailed,
                format!("{capacity} bytes are no multiple of the disk's blocks of {block_size}"),
            );
        }
        if capacity > before {
            self.attempted.store(capacity, Ordering::Relaxed);
            // So that it is kept for another server in one step with what is said of it below. It
            // is not undone: what else the domain has written down meanwhile stays.
            let claimed = self.claim_to_resize()?;
            self.storage.begin(live.id);
            let resized = live.instance.resize(capacity);
            let label = live.label();
            if resized.is_ok() {
                live.set_capacity(capacity);
                let standby = others.standby.as_ref();
                if let Some(standby) = standby
                    && standby.refreshed().info.capacity != capacity
                {
                    log::warn!(
                        "the standby, {}, cannot be resized: it can neither take over nor be rolled back to",
                        standby.label()
                    );
                }
                self.keeping.resized(&live, standby);
            }
            self.storage.commit();
            drop(claimed);
            match resized {
                Ok(()) => {}
                Err(CallError::Panicked(why)) => {
                    // Either capacity may be in storage: what takes over says which.
                    let why = format!("{label} has panicked while it was resized: {why}");
                    self.died(&live, &why);
                    return refused(Code::ResizePanicked, why);
                }
                Err(CallError::Failed(_)) if live.is_dead() => return Err(preempted()),
                Err(CallError::Failed(why)) => {
                    self.attempted.store(0, Ordering::Relaxed);
                    return refused(Code::ResizeFailed, format!("{label} was not resized: {why}"));
                }
            }
            self.set_record(&live.record());
            self.attempted.store(0, Ordering::Relaxed);
        }
        Ok(Resized { generation, before, capacity })
    }

    /// Claims the data while it is resized, whether rings run or not. Given back when that is
    /// dropped.
    fn claim_to_resize(self: &Arc<Self>) -> Result<impl Drop + use<>, Refusal> {
        struct Wanted(Arc<DomainProxy>);
        impl Drop for Wanted {
            fn drop(&mut self) {
                self.0.give_back();
                self.0.release_claim();
            }
        }
        self.want_claim();
        let wanted = Wanted(Arc::clone(self));
        let why = match self.claim(false) {
            Claimed::Yes => return Ok(wanted),
            Claimed::Taken => "another program uses the disk's data",
            Claimed::NotNow(_) => "it cannot be told whether another program uses the disk's data",
        };
        Err(Refusal::new(Code::ResizeFailed, format!("the disk is not resized: {why}")))
    }

    /// Whether the capacity may have become this one, though the domain that was to be resized has
    /// died and not said so.
    pub(crate) fn may_have_resized(&self, capacity: u64) -> bool {
        self.attempted.load(Ordering::Relaxed) == capacity
    }

    /// Has `tell` called whenever the configuration space that the guest sees has changed, on a
    /// thread that holds no lock of the device: it is what a frontend can be told. The first one
    /// stays.
    pub fn on_config_change(&self, tell: impl Fn() + Send + Sync + 'static) {
        let _ = self.config_hook.set(Box::new(tell));
    }

    pub(crate) fn config_changed(&self) {
        if let Some(tell) = self.config_hook.get() {
            tell();
        }
    }
}
