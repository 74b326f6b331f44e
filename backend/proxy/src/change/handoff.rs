//! The device is given to another process: the bracket of a handover, without a successor here.
//!
//! ```text
//!   gate -> drain -> quiesce -> (told) -> ........ workers stay at the gate ........
//!                                             the other one serves: this process ends
//!                                             it does not: resume -> open
//! ```
//!
//! What cannot be told is not given: it serves on here.
//!
//! Invariants: from when it is told to when it is called back, nothing here touches a ring, guest
//! memory or the storage; a domain that dies meanwhile is dealt with after that.

use crate::change::handover::ExchangeNotes;
use crate::device::DomainProxy;
use crate::domain::LoadedDomain;
use crate::record::code::Code;
use crate::record::report::{Options, Phases, Refusal};
use crate::signal::lock;
use std::sync::{Arc, Mutex, mpsc};

impl DomainProxy {
    /// Stops at a batch boundary, with nothing in flight, and says so with `stopped`; comes back
    /// when `resume` says that the device is this process's again, and it serves. Another change is
    /// waited for as long as requests in flight are, because the frontend is held meanwhile.
    /// `stopped` fails if the other process does not have what there is.
    ///
    /// # Errors
    /// Why it was not stopped; it serves on.
    pub fn hand_off(
        self: &Arc<Self>,
        options: Options,
        stopped: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
        resume: mpsc::Receiver<()>,
    ) -> Result<(), Refusal> {
        // The next server could not judge a canary of this one.
        self.canary.check_idle()?;
        let _operator = self.operate_soon(options)?;
        self.check_stopping()?;
        self.canary.check_idle()?;
        let mut others = self.lock_after_takeover(options)?;
        self.finish_earlier(&mut others, options)?;
        let live = self.live();
        let resume = Arc::new(Mutex::new(resume));
        let exchange = |notes: Arc<Mutex<ExchangeNotes>>| {
            let (live, stopped, resume) = (live.clone(), Arc::clone(&stopped), Arc::clone(&resume));
            let proxy = Arc::clone(self);
            Box::new(move |_: &Option<LoadedDomain>| {
                let mut notes = lock(&notes);
                if let Some(live) = &live {
                    notes.quiesce(live)?;
                    if let Err(error) = proxy.preparer.images.give_back() {
                        let why = format!("its image is not given back: {error}");
                        notes.refusal = Some(Refusal::new(Code::QuiesceFailed, why));
                        proxy.go_on(live, &mut notes);
                        return None;
                    }
                }
                // With what quiescing has written down.
                proxy.keeping.tell();
                if let Err(why) = stopped() {
                    let why = format!("what there is cannot be told to another process: {why}");
                    notes.refusal = Some(Refusal::new(Code::QuiesceFailed, why));
                    if let Some(live) = &live {
                        proxy.go_on(live, &mut notes);
                    }
                    return None;
                }
                // The other side is only gone when this process is about to end.
                let _ = lock(&resume).recv();
                if let Some(live) = &live {
                    proxy.go_on(live, &mut notes);
                }
                notes.came_back = true;
                None
            }) as srcu::Exchange<Option<LoadedDomain>>
        };
        self.begin_leaving(options)?;
        let stayed = self.at_the_gate(live.as_ref(), options, &mut Phases::default(), &exchange);
        self.end_leaving();
        stayed
    }

    /// The live domain serves again, with its images.
    fn go_on(&self, live: &LoadedDomain, notes: &mut ExchangeNotes) {
        notes.resume(live);
        if self.claims.is_wanted()
            && let Err(why) = self.preparer.images.take_back()
        {
            notes.fault = Some(why.to_string());
        }
    }
}
