//! The control socket: how an operator commands a running daemon.
//!
//! JSON-RPC 2.0 over a Unix stream socket, one object per line in both directions; the methods are
//! `status`, `check`, `upgrade`, `rollback`, `upgrade_daemon`, `resize`, `limit`, `history`,
//! `watch` and `shutdown`. This crate knows the protocol and the socket, on both sides: the server
//! in a daemon, and `hotswapctl`. What
//! the methods *do* is behind [`Operations`], so that all of it can be tested without a device.
//!
//! The parts: [`messages`] are the methods' parameters, [`Code`] the words for what goes wrong,
//! [`rpc`] turns one line into a call and a result into one line; `connection` is the life of one
//! client, [`Server`] accepts clients and ends them, [`SocketFile`] is the path that they connect
//! to; [`client`] is the other side.
//!
//! Invariants:
//! * Only root and the daemon's own user are served: mode 0600 before the name is visible, and the
//!   peer's uid.
//! * Every request that carries an id is answered exactly once, in the order of arrival. Every
//!   refusal says a stable code string (`data.code`) and a sentence.
//! * No client can hold up the daemon, or another client: lines, connections and the time that a
//!   reply may take have limits ([`Limits`]), and a client's thread is only its own.
//!
//! Deliberately absent: batches, authentication beyond the peer's uid, any transport but this one,
//! and any knowledge of domains, queues or generations.

mod canary;
pub mod client;
mod clients;
mod code;
mod connection;
mod credentials;
mod exhausted;
mod limit_args;
mod limits;
pub mod lines;
pub mod messages;
mod operations;
mod peer;
pub mod rpc;
mod server;
mod socket;

pub use clients::refuse;
pub use code::Code;
pub use exhausted::how_to_have_more;
pub use limit_args::LimitArgs;
pub use limits::Limits;
pub use operations::{OperationError, Operations};
pub use peer::Commanders;
pub use server::{Adopting, Server};
pub use socket::{Access, KeptName, SOCKET_PATH_MAX, SocketError, SocketFile, SocketName};
