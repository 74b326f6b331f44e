//! The loop, with servers that a test plays.

mod vaults;
