//! What does I/O during a soak, and checks it.

use crate::Random;
use crate::act::Act;
use guest_tests::daemon::Daemon;

/// What does I/O, and checks it.
pub trait Witness {
    /// Whether that can happen to it.
    fn offers(&self, act: Act) -> bool;

    /// Lets the I/O go on for a moment; it must not stand still, nor have met a fault.
    fn breathe(&mut self, daemon: &Daemon, random: &mut Random);

    /// A number that is larger each time when something was answered. I/O that has ended by itself
    /// is checked, and begun again.
    fn answered(&mut self) -> u64;

    /// Disconnects, and comes again.
    fn reconnect(&mut self, has_requests_in_flight: bool);

    /// Its machine is reset.
    fn reset(&mut self);

    /// What has to be done before the whole daemon is killed, and when it is there again.
    fn lets_go(&mut self);
    fn comes_back(&mut self);

    /// The disk has this size now.
    fn is_told_of(&mut self, megabytes: u64);

    /// Ends the I/O, of which everything must be as it was written.
    fn end(&mut self);
}
