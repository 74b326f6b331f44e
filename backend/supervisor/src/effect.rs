//! What the relay has its session do.

use crate::descriptor::Descriptor;
use crate::region::Region;
use crate::wire::Message;

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// A message goes to the frontend.
    Frontend(Message),
    /// A message goes to the server.
    Server(Message),
    /// The server is to use this region; it says when it does
    /// ([`Relay::inflight_is_taken`](crate::relay::Relay::inflight_is_taken)).
    Inflight(Region),
    /// What these kick is to be looked at.
    Kick(Vec<Descriptor>),
    /// A message goes to the frontend through its other connection.
    Backend(Descriptor, Message),
    /// An answer goes to the session that waits.
    Other(Message),
    /// The frontend's connection is to be ended, after what is on its way to it.
    Close(String),
}
