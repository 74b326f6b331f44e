//! What is told to those who watch: events, and the page of metrics.
//!
//! Counters of requests lie in a memfd of this process. Servers write them; here they are only
//! read, so that they are there while no server lives, and go on where they were when another one
//! does.

use super::{Supervisor, Watched};
use crate::front::Ticket;
use crate::pages::{PackedPages, Pages};
use crate::process::Server;
use crate::slots::{Missing, Packing, Slot, Unpacking};
use channel::ToServer;
use control::Code;
use control::rpc::RpcError;
use rustix::event::PollFlags;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;
use telemetry::counters::LAYOUT;
use telemetry::counts::{self, QueueCounts};
use telemetry::page::{Format, Labels, Snapshot};

/// Metrics that were asked for.
#[derive(Debug)]
pub struct Metrics {
    pages: Pages,
    /// Where servers count.
    memory: File,
}

/// [`Metrics`] in a packed state.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct PackedMetrics {
    pages: PackedPages,
    memory: Slot,
}

impl Metrics {
    /// Those of a device of so many queues.
    ///
    /// # Errors
    /// There is no memory for them.
    pub fn new(pages: Pages, queues: u16) -> io::Result<Self> {
        Ok(Self { pages, memory: counts::make(channel::memfd("hotswap-counters")?, queues)? })
    }

    pub(super) fn polled(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        self.pages.polled()
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.pages.deadline()
    }

    pub(super) fn pack<'a>(&'a self, packing: &mut Packing<'a>) -> PackedMetrics {
        let memory = packing.put(self.memory.as_fd());
        PackedMetrics { pages: self.pages.pack(packing), memory }
    }

    pub(super) fn unpack(
        packed: PackedMetrics,
        unpacking: &mut Unpacking,
    ) -> Result<Self, Missing> {
        let memory = unpacking.take(packed.memory)?.into();
        Ok(Self { pages: Pages::unpack(packed.pages, unpacking)?, memory })
    }
}

impl Supervisor {
    /// Tells a server, before anything else, where it counts.
    pub(super) fn give_counters(&self, server: &Server) {
        let Some(metrics) = &self.watched.metrics else { return };
        let message = ToServer::Counters { layout: LAYOUT };
        if let Err(error) = server.channel.send(&message, &[metrics.memory.as_fd()]) {
            log::debug!("a server is not told where it counts: {error}");
        }
    }

    /// The server says that something has happened.
    pub(super) fn has_happened(&mut self, event: Value) {
        let Value::Object(event) = event else { return };
        self.watched.tally.note(&Value::Object(event.clone()));
        if let Some(front) = &mut self.front {
            front.happened(event);
        }
    }

    /// Something has happened here.
    pub(super) fn event(&mut self, event: &str, members: Value) {
        let mut all = Map::from_iter([("event".to_owned(), event.into())]);
        all.extend(members.as_object().cloned().unwrap_or_default());
        self.has_happened(Value::Object(all));
    }

    /// Says what the thread has met that writes down what has happened.
    pub(super) fn settle_history(&mut self) {
        if let Some(why) = self.front.as_mut().and_then(crate::front::Front::trouble) {
            self.said.say(&format!(
                "what has happened is not written down, which is tried again: {why}"
            ));
        }
    }

    /// No server has requests in flight.
    pub(super) fn none_in_flight(&self) {
        let Some(metrics) = &self.watched.metrics else { return };
        if let Err(error) = counts::none_in_flight(&metrics.memory, self.options.settings.queues) {
            log::error!("counters cannot be written: {error}");
        }
    }

    pub(super) fn settle_pages(&mut self) {
        let Some(mut metrics) = self.watched.metrics.take() else { return };
        let mut was_asked = false;
        let Metrics { pages, memory } = &mut metrics;
        pages.advance(|format| {
            was_asked = true;
            self.snapshot(self.counts(memory)).page(format)
        });
        self.watched.metrics = Some(metrics);
        if was_asked && let Some(front) = &mut self.front {
            front.look_again();
        }
    }

    fn counts(&self, memory: &File) -> Vec<QueueCounts> {
        counts::read(memory, self.options.settings.queues).unwrap_or_else(|error| {
            log::error!("counters cannot be read: {error}");
            Vec::new()
        })
    }

    /// A client wants the metrics.
    pub(super) fn tell_metrics(&mut self, ticket: Ticket) {
        let answer = match &self.watched.metrics {
            Some(metrics) => {
                let counts = self.counts(&metrics.memory);
                let queues: Vec<Value> =
                    counts.iter().enumerate().map(|(queue, of)| of.json(queue)).collect();
                let text = self.snapshot(counts).page(Format::Plain);
                let content_type = Format::Plain.content_type();
                Ok(json!({ "content_type": content_type, "text": text, "queues": queues }))
            }
            None => Err(RpcError::new(
                Code::MetricsOff,
                "this daemon does not count; start it with --metrics ADDRESS",
            )),
        };
        if let Some(front) = &mut self.front {
            front.look_again();
            front.answer(ticket, answer);
        }
    }

    /// All that the page shows.
    fn snapshot(&self, queues: Vec<QueueCounts>) -> Snapshot {
        let status = self.front.as_ref().map(crate::front::Front::status).unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let labels = |of: &Value, members: &[&'static str]| -> Labels {
            members.iter().map(|member| (*member, text(&of[*member]))).collect()
        };
        let server = &status["server"];
        let mut build = labels(&status["supervisor"], &["version"]);
        build.push(("server_version", text(&server["version"])));
        let since = |of: &Value| of["since"].as_u64().unwrap_or(0);
        let limit = |member: &str| status["limits"][member].as_u64();
        Snapshot {
            queues,
            tally: self.watched.tally.clone(),
            state: text(&status["state"]),
            generation: status["generation"].as_u64(),
            capacity: status["capacity"].as_u64(),
            is_connected: status["connected"].as_bool().unwrap_or(false),
            resident_modules: status["resident_modules"].as_array().map_or(0, Vec::len) as u64,
            deaths: self.deaths.count,
            quarantined: self.deaths.quarantined_count,
            iops: limit("iops"),
            bandwidth: limit("bandwidth"),
            held_up: limit("held_up"),
            since_ms: vec![("supervisor", since(&status["supervisor"])), ("server", since(server))],
            build,
            domain: labels(&status["domain"], &["name", "version", "sha256"]),
        }
    }
}

impl Watched {
    /// Counts how an exchange of the program has ended.
    pub(super) fn exchange_ended(&mut self, is_done: bool) {
        self.tally.ended("exchange", if is_done { "committed" } else { "refused" });
    }
}
