//! A virtqueue's worker: the way of a request from kick to call.
//!
//! By file: `worker` (the loop), `inputs` (what it is given for each batch), `ring` (what is known
//! of a ring while it is on), `poller` (look again, or sleep?), `notices` (what the log is told of
//! a guest's mistakes).

mod inputs;
mod notices;
mod poller;
mod ring;
mod worker;

#[cfg(test)]
mod race_tests;
#[cfg(test)]
mod tests;

pub(crate) use inputs::BatchInputs;
pub(crate) use worker::QueueWorker;
