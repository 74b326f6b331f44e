//! When a worker counts: as a batch is given to the domain, and as its answers are in the ring.

use super::meter::{Meter, count_failed, now_ns, operation, uniform};
use super::worker::QueueWorker;
use proxy::slot_of;
use telemetry::Line;
use virtqueue::Used;

impl QueueWorker {
    /// Counts its requests there, if anywhere.
    pub(crate) fn counting(mut self, line: Option<&'static Line>) -> Self {
        self.meter = Meter::new(line);
        self
    }

    /// The batch is about to be given to the domain.
    #[inline]
    pub(super) fn count_taken(&mut self) {
        if let Some(line) = self.meter.line {
            line.set_in_flight((self.device.awaited() + self.batch.len()) as u64);
        }
    }

    /// The domain has the batch, or has answered it; `awaited` is how many others it had before.
    #[inline]
    pub(super) fn count_submitted(&mut self, awaited: usize, accepted: usize) {
        if self.meter.line.is_none() {
            return;
        }
        let is_over = awaited == 0
            && self.device.awaited() == 0
            && !self.requests.has_immediate()
            && accepted == self.batch.len()
            && self.used.len() == accepted;
        self.meter.uniform = if is_over { uniform(&self.batch) } else { None };
        if self.meter.uniform.is_none() {
            self.note_each(accepted);
        }
    }

    /// Notes when each request was taken.
    #[inline(never)]
    fn note_each(&mut self, accepted: usize) {
        let Self { meter, requests, batch, .. } = self;
        let taken_ns = meter.taken_ns;
        for request in &batch[..accepted] {
            meter.note(slot_of(request.tag), taken_ns);
        }
        if !requests.has_immediate() {
            return;
        }
        for (head, failed) in requests.immediate_answers(accepted) {
            meter.note(usize::from(head), taken_ns);
            if failed {
                count_failed(requests, meter.line, usize::from(head));
            }
        }
    }

    /// The answers are in the ring.
    #[inline]
    pub(super) fn count_published(&mut self) {
        let Some(line) = self.meter.line else { return };
        let now = now_ns();
        self.meter.looked_ns = Some(now);
        line.set_in_flight(self.device.in_flight() as u64);
        match self.meter.uniform.take() {
            Some((kind, requests, bytes)) => {
                let ns = now.saturating_sub(self.meter.taken_ns);
                line.answered(operation(kind), requests, bytes, ns);
            }
            None => self.count_each(line, now),
        }
    }

    /// What is in flight is given up: it is not published here any more.
    pub(super) fn count_given_up(&self) {
        if let Some(line) = self.meter.line {
            line.set_in_flight(0);
        }
    }

    #[inline(never)]
    fn count_each(&mut self, line: &Line, now: u64) {
        let Self { meter, requests, used, .. } = self;
        for Used { head, .. } in used.iter() {
            let head = usize::from(*head);
            let Some((kind, bytes)) = requests.asked(head) else { continue };
            let since = meter.since_ns.get(head).copied().unwrap_or(now);
            line.answered(operation(kind), 1, bytes, now.saturating_sub(since));
        }
    }
}
