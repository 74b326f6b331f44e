//! A check: everything of an upgrade that needs no worker, and then the end of what was loaded.
//!
//! It answers with the refusal that the upgrade would answer with now, for all that is decided
//! before the gate. What comes behind that (a drain, the live domain's state and its taking up) no
//! check can know.

use crate::device::DomainProxy;
use crate::record::report::{Checked, Options, Phases, Refusal};
use domain_abi::Params;
use std::sync::Arc;

impl DomainProxy {
    /// Whether [`upgrade`](Self::upgrade) would accept the module `name`, and by which protocol.
    /// It is verified, loaded, prepared and let go again; nothing of it is left, and nothing is
    /// told of it.
    ///
    /// # Errors
    /// Why it would be refused.
    pub fn check(
        self: &Arc<Self>,
        name: &str,
        params: Params,
        options: Options,
    ) -> Result<Checked, Refusal> {
        let _operator = self.operate(options)?;
        let mut phases = Phases::default();
        let next = self.prepare_after_earlier(options, || {
            self.canary.check_idle()?;
            let live = self.record();
            let is_wanted = || self.check_stopping();
            self.preparer.prepare(name, params, Some(&live), is_wanted, &mut phases)
        })?;
        let (others, judged) = self.try_until_alive(options, |_| {
            let from = self.record();
            let live = self.live_noticed();
            let protocol = self.accept(&from.info, live.as_ref(), &next, options)?;
            let can_roll_back = live.is_some_and(|live| live.accepts_schema_of(&next));
            Ok((protocol, can_roll_back, from))
        });
        drop(others);
        let to = next.record();
        // It was never live, so it has no requests. What cannot be unmapped is a resident, as after
        // an upgrade.
        let left = self.retire(next, options.limit(), &mut phases);
        let (protocol, can_roll_back, from) = judged?;
        Ok(Checked { protocol, can_roll_back, from, to, left: left.err(), phases })
    }
}
