//! A virtqueue's worker: the way of a request from kick to call.
//!
//! By file: `worker` (the loop), `inputs` (what it is given for each batch), `ring` (what is known
//! of a ring while it is on), `tracking` (where what is in flight is marked), `replay` (what does
//! not go the usual way), `admission` (a rate limit), `meter` and `counting` (what is counted, and
//! when), `publish` (answers to the guest, and a migration's log), `poller` (look again, or
//! sleep?), `notices` (what the log is told of).

mod admission;
mod counting;
mod inputs;
mod meter;
mod notices;
mod poller;
mod publish;
mod replay;
mod ring;
mod tracking;
mod worker;

#[cfg(test)]
mod race_tests;
#[cfg(test)]
mod recovery_tests;
#[cfg(test)]
mod tests;

pub(crate) use inputs::BatchInputs;
pub(crate) use worker::QueueWorker;
