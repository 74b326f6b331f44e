//! A domain without the ABI: its safe trait, called as any library is. What the ABI and everything
//! above it cost is the difference.
//!
//! The calls are generic over the domain, so that the compiler may put it into its caller, which
//! across the ABI it cannot. Nothing is caught and nothing is checked. For benchmarks only;
//! [`Instance`](domain_host::Instance) is how a domain is used.

use domain_abi::Params;
use domain_abi::{RawRequest, RawSegment};
use domain_api::{Batch, BlockDomain, Completions, DomainError, Host, QueueContext, QueueIndex};
use domain_host::{CompletionBuffer, HostServices, leaked_table};
use std::sync::Arc;

/// A domain and its queue 0.
#[derive(Debug)]
pub struct Direct<D: BlockDomain> {
    queue: D::Queue,
    domain: D,
}

impl<D: BlockDomain> Direct<D> {
    /// Prepares and activates a domain, whose storage `services` must let it have, and attaches its
    /// queue 0.
    ///
    /// # Errors
    /// What the domain says.
    pub fn activated(
        services: Arc<dyn HostServices>,
        params: &Params,
    ) -> Result<Self, DomainError> {
        // SAFETY: the table is valid for ever, for a domain may have left copies of `Host` anywhere
        // in this program.
        let host = unsafe { Host::from_vtable(leaked_table(services)) };
        let domain = D::prepare(host, params)?;
        domain.activate()?;
        let queue = domain.attach_queue(QueueContext { queue: QueueIndex(0) })?;
        Ok(Self { queue, domain })
    }

    /// Offers requests; returns how many were taken. What ended at once is in `completions`.
    #[inline]
    pub fn submit(&mut self, requests: &[RawRequest], completions: &mut CompletionBuffer) -> usize {
        let mut accepted = 0;
        // SAFETY: what made the requests answers for how often they are offered, as with
        // `QueueHandle::submit`; the domain completes into the list, which is as the buffer made
        // it.
        let (mut batch, mut out) =
            unsafe { (Batch::new(requests, &mut accepted), Completions::new(completions.raw())) };
        self.domain.submit(&mut self.queue, &mut batch, &mut out);
        accepted
    }

    /// Collects what completed since.
    #[inline]
    pub fn reap(&mut self, completions: &mut CompletionBuffer) {
        // SAFETY: as in `submit`.
        let mut out = unsafe { Completions::new(completions.raw()) };
        self.domain.reap(&mut self.queue, &mut out);
    }
}

/// Requests of one kind all over a disk, each with a piece of memory that starts at a page. Kept
/// until the end of the program, because a domain may have them.
#[must_use]
pub fn requests(op: u32, count: usize, len: usize, capacity: u64) -> Vec<RawRequest> {
    const PAGE: usize = 4096;
    let memory = vec![0x5au8; count * len + PAGE].leak();
    let start = memory.as_ptr().align_offset(PAGE);
    let base = memory.as_mut_ptr();
    let segments: &[RawSegment] = (0..count)
        // SAFETY: inside the memory, which is never freed, and has no other name from here on.
        .map(|i| unsafe { RawSegment::new(base.add(start + i * len), len) })
        .collect::<Vec<_>>()
        .leak();
    let request = |(i, segment): (usize, &'static RawSegment)| {
        // A prime, so that neighbours in time are none on the disk.
        let offset = (i as u64).wrapping_mul(7919) % (capacity / len as u64) * len as u64;
        // SAFETY: the list is never changed or freed.
        let mut raw =
            unsafe { RawRequest::new(op, 0, offset, len as u64, std::slice::from_ref(segment)) };
        raw.tag = i as u64;
        raw
    };
    segments.iter().enumerate().map(request).collect()
}
