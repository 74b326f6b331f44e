//! The conformance suite: drives a domain through the ABI and checks that it keeps the contract.
//!
//! A domain is linked statically and driven by [`domain_host::Instance`], the very
//! code that drives a loaded module, over storage in memory ([`TestHost`]) and buffers of our own
//! as guest memory ([`Lane`]). What the suite knows about the right answers is a shadow copy of the
//! disk. Everything that it finds is a [`Violation`]: a sentence that names the call and what was
//! wrong with it.
//!
//! A domain that loses a request costs [`Options::deadline`], not a hanging test; the memory of
//! such a request is leaked, because the domain may still write to it.
//!
//! Deliberately absent: modules, upgrades under load, speed. And what only one kind of domain
//! promises; that belongs in its own tests, which can use [`Bench`], [`Lane`] and [`Job`] for it.

mod bench;
mod data;
pub mod direct;
mod domain;
mod guest;
mod lane;
mod lifecycle;
mod memory_image;
mod resizing;
mod static_module;
mod test_host;

pub use bench::Bench;
pub use lane::{Done, Job, Lane};
pub use memory_image::MemoryImage;
pub use static_module::StaticModule;
pub use test_host::{TestHost, TestStorage};

use domain::Domain;
use domain_api::{BlockDomain, Params};
use std::time::Duration;

/// How to check a domain.
#[derive(Debug, Clone)]
pub struct Options {
    /// What to prepare it with. Make a small disk: the suite reads all of it, and writes most.
    pub params: Params,
    /// Whether what is written is read back. Without it every read must give zeros.
    pub data: bool,
    /// Values that it must refuse, besides the ones that the suite knows for `size`, `serial`,
    /// `direct` and `readonly`: key and value. The sentence must name the key.
    pub refused: Vec<(String, String)>,
    /// Whether it can be resized; if not, it must say so, and go on.
    pub resizes: bool,
    /// Parameters with which some request soon panics, for a domain that does so on demand.
    pub panics: Option<Params>,
    /// Queues to serve at the same time.
    pub queues: u32,
    /// Longest time that a request may take.
    pub deadline: Duration,
    /// Where the random choices start.
    pub seed: u64,
}

/// How long a request may take if nothing else is said: a disk that others flush to, on a host that
/// has more to do than it can, has needed more than ten seconds for a flush.
pub(crate) const DEADLINE: Duration = Duration::from_mins(1);

impl Options {
    /// For a disk that keeps its data.
    #[must_use]
    pub fn new(params: Params) -> Self {
        Self {
            params,
            data: true,
            refused: Vec::new(),
            resizes: false,
            panics: None,
            queues: 4,
            deadline: DEADLINE,
            seed: 0x5eed_d15c,
        }
    }
}

/// What a domain did that the contract does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Violation(String);

impl Violation {
    pub(crate) fn new(sentence: impl Into<String>) -> Self {
        Self(sentence.into())
    }

    /// Says during what it was found.
    pub(crate) fn during(self, what: &str) -> Self {
        Self(format!("{what}: {}", self.0))
    }
}

/// What a run covered.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Coverage {
    /// Names of the checks that ran, in order.
    pub checks: Vec<&'static str>,
}

/// Fails the test that calls it if `D` breaks the contract.
///
/// # Panics
/// With the violation.
pub fn run<D: BlockDomain>(options: &Options) -> Coverage {
    check::<D>(options)
        .unwrap_or_else(|violation| panic!("domain `{}` breaks the contract: {violation}", D::NAME))
}

/// Checks whether `D` keeps the contract.
///
/// # Errors
/// The first violation.
pub fn check<D: BlockDomain>(options: &Options) -> Result<Coverage, Violation> {
    every_check(Domain::of::<D>(), options)
}

fn every_check(domain: Domain, options: &Options) -> Result<Coverage, Violation> {
    type Check = fn(Domain, &Options) -> Result<(), Violation>;
    let mut checks: Vec<(&'static str, Check)> = vec![
        ("constants", lifecycle::constants),
        ("parameters", lifecycle::parameters),
        ("preparing", lifecycle::preparing),
        ("announcement", lifecycle::announcement),
        ("unknown requests", data::unknown_requests),
        ("reads", data::reads),
        ("segments", data::segments),
        ("flush, discard, write zeroes", data::other_requests),
        ("deep queue", data::deep_queue),
        ("random requests on several queues", data::several_queues),
        ("queue moves between threads", lifecycle::moving_queue),
        ("optional calls", lifecycle::optional_calls),
        ("handover and rollback", lifecycle::handover),
        ("upgrade given up", lifecycle::given_up),
        ("side by side", lifecycle::side_by_side),
        ("death", lifecycle::death),
        ("resizing", resizing::resizing),
    ];
    if options.panics.is_some() {
        checks.push(("panic", lifecycle::panic));
    }
    let mut coverage = Coverage::default();
    for (name, check) in checks {
        check(domain, options).map_err(|violation| violation.during(name))?;
        coverage.checks.push(name);
    }
    Ok(coverage)
}

/// Fails with a sentence unless `holds`.
fn ensure(holds: bool, sentence: impl FnOnce() -> String) -> Result<(), Violation> {
    if holds { Ok(()) } else { Err(Violation::new(sentence())) }
}

/// Xorshift: repeatable, and good enough to choose offsets.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `limit`, which is not 0.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}
