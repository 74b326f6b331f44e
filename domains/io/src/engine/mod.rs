//! The engine: requests between a host that offers them in batches and storage that takes its time.
//!
//! ```text
//!   request -> begin: at once? -- yes --> done
//!                |no / in part
//!                v
//!              port -> storage -> ended: more to be done (a plainer way, an edge, a sync) -> port
//!                                   |
//!                                   v
//!                                  done
//! ```
//!
//! A domain that keeps its data behind descriptors brings two things: a [`Port`], where a queue's
//! requests wait (an io_uring [`Ring`](crate::uring::Ring) is one; a socket or a library with
//! callbacks can be another), and a [`Backend`], which says what each request maps to. The engine
//! has the rest:
//!
//! - [`Engine`] and [`Queue`]: what is in flight and where, how much may be taken from the host,
//!   what was asked to be given up, and each answer exactly once;
//! - [`ranges`]: which change has which range to itself; [`modify`]: read, change, write;
//! - one sync at a time for each queue, shared by all requests that wait for it;
//! - a thread for what neither a port nor a worker should do ([`Step::Offload`]);
//! - [`Bounce`], for what a worker moves itself; [`InlineHeuristic`], whether it is worth trying
//!   something at once; [`ErrorLog`], what the operator hears.
//!
//! What each side promises, when which call is made and what is *not* called is written at the two
//! traits.
//!
//! Deliberately unknown here: files, what a request means, and what becomes of an error.

mod backend;
mod bounce;
mod error_log;
mod inline_heuristic;
pub mod modify;
mod offload;
mod port;
mod queue;
pub mod ranges;
mod shared;
mod sync_turn;

pub use backend::{AfterSync, Backend, BackendStep, Opens, QueueState, Step};
pub use bounce::Bounce;
pub use error_log::ErrorLog;
pub use inline_heuristic::InlineHeuristic;
pub use offload::OffloadTask;
pub use port::{JobKind, Port, PortEnd};
pub use queue::{Engine, Queue, is_cancelled};
pub use ranges::{Ranges, SECTOR};
pub use shared::Shared;
