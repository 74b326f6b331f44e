//! What must be true of a successor, and by which protocol it may replace the live domain.

use crate::change::refusals;
use crate::device::DomainProxy;
use crate::domain::LoadedDomain;
use crate::record::code::Code;
use crate::record::report::{Mode, Protocol, Refusal};
use domain_abi::{Capabilities, DeviceInfo, Swap};

impl DomainProxy {
    /// What must be true of a successor: the guest was told all this and cannot be told otherwise.
    pub(crate) fn check_compatible(
        &self,
        live: &DeviceInfo,
        next: &LoadedDomain,
    ) -> Result<(), Refusal> {
        let (schema, accepted) =
            (self.storage.schema(), &next.instance.description().accepted_schemas);
        if schema != 0 && !accepted.contains(&schema) {
            return Err(refusals::schema(&next.label(), accepted, schema));
        }
        let next = &next.refreshed().info;
        let differs = |what: &str, live: &dyn std::fmt::Display, next: &dyn std::fmt::Display| {
            Err(Refusal::new(
                Code::DeviceDiffers,
                format!(
                    "the new domain's {what} is {next}, the guest was told {live}; give it the same"
                ),
            ))
        };
        if (&live.backing_kind, live.backing_id) != (&next.backing_kind, next.backing_id) {
            return Err(Refusal::new(
                Code::DifferentBacking,
                format!(
                    "the new domain would serve another disk ({} {:?}, now {} {:?}); an upgrade replaces the implementation, it does not move a disk",
                    next.backing_kind, next.backing_id, live.backing_kind, live.backing_id
                ),
            ));
        }
        if live.capacity != next.capacity && !self.may_have_resized(next.capacity) {
            return differs("capacity in bytes", &live.capacity, &next.capacity);
        }
        if live.block_size != next.block_size {
            return differs("block size", &live.block_size, &next.block_size);
        }
        if live.physical_block_size != next.physical_block_size {
            return differs(
                "physical block size",
                &live.physical_block_size,
                &next.physical_block_size,
            );
        }
        if live.serial != next.serial {
            return differs(
                "serial number",
                &format!("`{}`", live.serial),
                &format!("`{}`", next.serial),
            );
        }
        let needed = self.required_capabilities();
        if !next.capabilities.contains(needed) {
            let missing = Capabilities(needed.0 & !next.capabilities.0);
            return Err(Refusal::new(
                Code::FeatureMissing,
                format!(
                    "the new domain lacks capabilities {:#x} that the guest was offered; use one that has them, or upgrade while no guest is connected",
                    missing.0
                ),
            ));
        }
        let read_only = |info: &DeviceInfo| info.capabilities.contains(Capabilities::READ_ONLY);
        if read_only(live) != read_only(next) {
            return differs("read-only flag", &read_only(live), &read_only(next));
        }
        Ok(())
    }
}

/// Swap or handover?
pub(crate) fn decide(
    mode: Mode,
    live: Option<&LoadedDomain>,
    next: &LoadedDomain,
) -> Result<Protocol, Refusal> {
    let Some(live) = live else { return Ok(Protocol::Handover) };
    // Asked now: what the storage wants of them may have changed since they were prepared.
    let may_swap = |domain: &LoadedDomain| {
        domain.instance.info().is_ok_and(|info| info.swap == Swap::SameBacking)
    };
    let both_may = may_swap(live) && may_swap(next);
    if live.is_dead() {
        return Err(refusals::preempted());
    }
    let (a, b) = (&live.record().info, &next.record().info);
    let why_not = if !both_may {
        Some("one of the two domains holds state of its own")
    } else if a.backing_cache != b.backing_cache {
        Some("they would use different caches of the same disk")
    } else {
        None
    };
    match (mode, why_not) {
        (Mode::Auto | Mode::Swap, None) => Ok(Protocol::Swap),
        (Mode::Auto | Mode::Handover, _) => Ok(Protocol::Handover),
        (Mode::Swap, Some(why)) => Err(Refusal::new(
            Code::SwapNotPossible,
            format!("these domains cannot serve side by side: {why}; use mode handover or auto"),
        )),
    }
}
