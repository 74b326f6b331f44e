//! A module between its check and its mapping.

use crate::sealed::Sealed;
use domain_abi::descriptor::Description;
use domain_host::Identity;

/// A copy that was checked, and is mapped nowhere.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) sealed: Sealed,
    pub(crate) description: Description,
    pub(crate) identity: Identity,
}
