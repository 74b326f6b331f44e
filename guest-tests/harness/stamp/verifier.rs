//! The load on one queue: random requests over the queue's own range, every answer checked.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::load::{FINISH, GO_ON, LoadOptions, Shared};
use super::{BLOCK, Content, Ledger, LoadReport, Stamp, mix};
use crate::client::{Completion, Queue, Request, Status, features};

#[derive(Clone, Copy, Debug)]
enum Kind {
    Read,
    Write,
    Zero,
    Discard,
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct Op {
    kind: Kind,
    first: usize,
    count: usize,
    sequence: u64,
}

/// The load on one queue.
pub(super) struct Verifier {
    queue: Queue,
    ledger: Ledger,
    options: LoadOptions,
    /// Kinds of requests, each as often as it is to be drawn.
    kinds: Vec<Kind>,
    busy: Vec<bool>,
    ops: Vec<Option<Op>>,
    free: Vec<usize>,
    random: u64,
    data: Vec<u8>,
    report: LoadReport,
    shared: Arc<Shared>,
}

impl Verifier {
    pub(super) fn new(
        queue: Queue,
        ledger: Ledger,
        options: &LoadOptions,
        offered: u64,
        shared: Arc<Shared>,
    ) -> Verifier {
        let mut kinds = [vec![Kind::Read; 50], vec![Kind::Write; 46]].concat();
        for (bit, kind) in [
            (features::FLUSH, Kind::Flush),
            (features::WRITE_ZEROES, Kind::Zero),
            (features::DISCARD, Kind::Discard),
        ] {
            kinds.extend((offered & bit != 0).then_some(kind));
        }
        Verifier {
            queue,
            kinds,
            busy: vec![false; ledger.blocks.len()],
            ops: vec![None; options.depth],
            free: (0..options.depth).collect(),
            random: mix(ledger.writer ^ ledger.sequence) | 1,
            data: vec![0; options.longest as usize * BLOCK],
            ledger,
            options: options.clone(),
            report: LoadReport::default(),
            shared,
        }
    }

    /// Loads the queue until told to stop.
    pub(super) fn run(mut self) -> LoadReport {
        let started = Instant::now();
        if let Err(error) = self.run_until_told() {
            self.report.unanswered += self.queue.in_flight() as u64;
            self.report.note(|| format!("the ring failed: {error}"));
            self.shared.faults.fetch_add(1, Ordering::Relaxed);
        }
        self.report.spurious = self.queue.spurious();
        self.report.elapsed = started.elapsed();
        self.report.ledgers.push(self.ledger);
        self.report
    }

    fn run_until_told(&mut self) -> io::Result<()> {
        loop {
            match self.shared.order.load(Ordering::Relaxed) {
                GO_ON => self.fill()?,
                FINISH if self.queue.in_flight() == 0 => return Ok(()),
                FINISH => {}
                _ => return Ok(()),
            }
            if self.queue.spurious() > 0 {
                // The ring's free list cannot be trusted any more.
                self.report.note(|| "a request was answered that was not in flight".to_owned());
                return Ok(());
            }
            if self.reap() == 0 {
                self.queue.wait(Duration::from_millis(50))?;
                if self.reap() == 0 && self.give_up() {
                    return Ok(());
                }
            }
        }
    }

    /// Keeps as many requests in flight as asked for, unless the dice fall on busy blocks only.
    fn fill(&mut self) -> io::Result<()> {
        for _ in 0..self.free.len() {
            if let Some(op) = self.draw() {
                let slot = self.free.pop().expect("counted");
                self.submit(slot, op)?;
            }
        }
        self.queue.kick()
    }

    /// A random request on blocks that no other request is on.
    fn draw(&mut self) -> Option<Op> {
        let kind = self.below(self.kinds.len() as u64) as usize;
        let kind = self.kinds[kind];
        let longest = self.options.longest;
        let count = if self.below(4) == 0 { 1 + self.below(longest) } else { 1 } as usize;
        let first = self.below((self.busy.len() - count + 1) as u64) as usize;
        let free = !self.busy[first..first + count].contains(&true);
        free.then_some(Op { kind, first, count, sequence: 0 })
    }

    fn submit(&mut self, slot: usize, mut op: Op) -> io::Result<()> {
        let offset = (self.ledger.first + op.first as u64) * BLOCK as u64;
        let len = op.count * BLOCK;
        self.ledger.sequence += 1;
        op.sequence = self.ledger.sequence;
        let request = match op.kind {
            Kind::Read => Request::Read { offset, len },
            Kind::Flush => Request::Flush,
            Kind::Discard => Request::Discard { offset, len: len as u64 },
            Kind::Zero => Request::WriteZeroes {
                offset,
                len: len as u64,
                unmap: op.sequence.is_multiple_of(2),
            },
            Kind::Write => {
                for (index, block) in self.data[..len].chunks_exact_mut(BLOCK).enumerate() {
                    let block_number = self.ledger.first + (op.first + index) as u64;
                    let stamp = Stamp {
                        block: block_number,
                        sequence: op.sequence,
                        writer: self.ledger.writer,
                    };
                    stamp.write(block);
                }
                Request::Write { offset, data: &self.data[..len] }
            }
        };
        self.queue.submit(request, slot as u64)?;
        for index in op.first..op.first + op.count {
            self.busy[index] = true;
            let possible = &mut self.ledger.blocks[index];
            match op.kind {
                Kind::Write if !possible.is_empty() => possible.push(Content::Write(op.sequence)),
                Kind::Zero if !possible.is_empty() => possible.push(Content::Zeros),
                Kind::Discard => possible.clear(),
                _ => {}
            }
        }
        self.ops[slot] = Some(op);
        Ok(())
    }

    /// Takes all answers and checks them.
    fn reap(&mut self) -> usize {
        let Verifier { queue, ledger, options, busy, ops, free, report, shared, .. } = self;
        let before = (report.ios, report.errors + report.mismatches);
        let count = queue.reap(|done| {
            let op = ops[done.context as usize].take().expect("an answer to a request in flight");
            free.push(done.context as usize);
            busy[op.first..op.first + op.count].fill(false);
            settle(ledger, options, report, op, &done);
        });
        shared.ios.fetch_add(report.ios - before.0, Ordering::Relaxed);
        shared.faults.fetch_add(report.errors + report.mismatches - before.1, Ordering::Relaxed);
        count
    }

    /// Whether a request has waited for too long; then it is on the record.
    fn give_up(&mut self) -> bool {
        let late = self.queue.overdue(self.options.patience);
        for slot in &late {
            self.report.note(|| {
                format!(
                    "unanswered after {:?}: {:?}",
                    self.options.patience, self.ops[*slot as usize]
                )
            });
        }
        self.report.unanswered += late.len() as u64;
        self.shared.faults.fetch_add(late.len() as u64, Ordering::Relaxed);
        !late.is_empty()
    }

    /// A random number below `limit`: xorshift64*.
    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}

/// Enters one answer into the ledger and the report.
fn settle(
    ledger: &mut Ledger,
    options: &LoadOptions,
    report: &mut LoadReport,
    op: Op,
    done: &Completion<'_>,
) {
    report.latency.record(done.latency);
    if done.status != Status::Ok {
        report.errors += 1;
        report.note(|| format!("{:?} for {op:?}", done.status));
        return;
    }
    report.ios += 1;
    let blocks = op.first..op.first + op.count;
    match op.kind {
        Kind::Write => blocks.for_each(|index| ledger.set(index, Content::Write(op.sequence))),
        Kind::Zero => blocks.for_each(|index| ledger.set(index, Content::Zeros)),
        Kind::Read if options.check_data => {
            for (index, bytes) in blocks.zip(done.data.chunks_exact(BLOCK)) {
                if let Err(wrong) = ledger.check(index, bytes) {
                    report.mismatches += 1;
                    report.note(|| wrong);
                }
            }
        }
        Kind::Read | Kind::Flush | Kind::Discard => {}
    }
}
