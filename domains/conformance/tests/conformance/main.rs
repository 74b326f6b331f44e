//! The suite that checks domains is checked itself, and so are hosts and modules of different ages.

mod older_host;
mod older_module;
mod suite;
