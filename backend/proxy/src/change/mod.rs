//! What replaces the live domain, or changes it: upgrades, takeovers, a new size, and the end of
//! the device.

pub(crate) mod check;
pub(crate) mod coming;
pub(crate) mod compatible;
pub(crate) mod drain;
pub(crate) mod fence;
pub(crate) mod handoff;
pub(crate) mod handover;
pub(crate) mod prepare;
pub(crate) mod refusals;
pub(crate) mod resize;
pub(crate) mod retire;
pub(crate) mod starved;
pub(crate) mod stop;
pub(crate) mod takeover;
pub(crate) mod upgrade;
pub(crate) mod wait;
