//! What a session begins with that its frontend does not say.

use virtio_blk::Belief;

/// Told what a driver believes, whenever that has changed.
pub type TellBelief = Box<dyn Fn(Belief) + Send + Sync>;

/// What a session begins with. By default it is a new one.
#[derive(Default)]
pub struct Beginning {
    /// Another process had it until now. Its messages come once more, from the first one on, and
    /// its driver goes on and believes this.
    pub resumed: Option<Belief>,
    /// Told what the driver believes, so that another process can go on with it.
    pub believes: Option<TellBelief>,
}
