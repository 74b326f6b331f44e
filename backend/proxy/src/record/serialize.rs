//! How fields are told that JSON has no type for.

use domain_abi::Params;
use serde::Serializer;
use std::time::Duration;

/// In whole microseconds: what took less than one is 0, and so is what did not happen.
pub(crate) fn micros<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX))
}

/// As an object of strings.
pub(crate) fn params<S: Serializer>(params: &Params, to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(params.iter())
}
