//! What a worker notes for a canary: when requests were taken and answered, and which have failed.

use crate::canary::latency::Probe;
use crate::datapath::inflight::slot_of;
use crate::datapath::worker::Worker;
use domain_abi::{RawRequest, status};

impl Worker {
    /// Whether it is to be noted when requests are taken.
    #[must_use]
    #[inline(always)]
    pub fn is_measured(&self) -> bool {
        self.proxy.canary.gauge.is_on()
    }

    /// These were taken from the ring, and are about to be submitted.
    #[cold]
    pub fn note_taken(&self, probe: &mut Probe, batch: &[RawRequest]) {
        probe.took(batch, self.in_flight() + batch.len(), slot_of);
    }

    /// Those in these slots have been answered.
    #[cold]
    pub fn note_answered(&self, probe: &mut Probe, slots: impl Iterator<Item = usize>) {
        probe.answered(&self.proxy.canary.gauge, slots);
    }

    /// The live domain does not take a request that it has to, which is answered with an error.
    #[cold]
    pub fn note_failed(&self, request: &RawRequest) {
        self.proxy.canary.errors.note(self.tags().generation(), request, status::IO_ERROR);
    }
}
