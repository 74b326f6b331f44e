//! Usual chains, taken from the available ring in one go.
//!
//! A loop of its own, and no part of the worker's: what it needs of table, ring, regions and limits
//! stays in registers, and each request is written once, where the batch has it.

use crate::requests::Parser;
use crate::view::RingView;
use domain_abi::RawRequest;
use virtio_blk::{Limits, usual};

/// What is taken from an available ring.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    /// The first position.
    pub first: u16,
    /// Most chains.
    pub chains: u16,
    /// No chain is taken behind so many bytes of data.
    pub bytes: u64,
}

/// What was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Taken {
    /// Chains.
    pub chains: u16,
    /// Bytes of their data.
    pub bytes: u64,
}

impl Parser<'_> {
    /// Takes chains as long as they are [usual](virtio_blk::usual) and their heads free, and adds
    /// them to `batch`, each with the name that `name` gives it. The next chain of the share, if
    /// there is one, is [`next`](Self::next)'s.
    #[inline(never)]
    pub fn take_usual(
        &mut self,
        view: &RingView,
        share: Share,
        limits: &Limits,
        name: impl Fn(&mut RawRequest, usize),
        batch: &mut Vec<RawRequest>,
    ) -> Taken {
        let mut taken = Taken::default();
        while taken.chains < share.chains && taken.bytes < share.bytes {
            let head = view.avail_entry(share.first.wrapping_add(taken.chains));
            let Some(entry) = self.entries.get_mut(usize::from(head)) else { break };
            if !entry.is_free() {
                break;
            }
            let Some(usual) = usual(head, self.translator, limits) else { break };
            let mut request = entry.usual(&usual);
            name(&mut request, usize::from(head));
            batch.push(request);
            taken.chains += 1;
            taken.bytes += usual.data.len() as u64;
        }
        *self.in_use += usize::from(taken.chains);
        self.requests += usize::from(taken.chains);
        taken
    }
}
