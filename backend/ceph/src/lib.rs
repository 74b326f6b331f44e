//! Images of a Ceph cluster, which the host opens for a device through librbd.
//!
//! - `spec.rs`: which image, how reached;
//! - `library.rs`, `handle.rs`: librados and librbd, opened at run time, and every call into them;
//!   `settings.rs`: what is set in them; `fate.rs`: what has become of an image;
//! - `image.rs`: an image as the host has it; `lock.rs`: whose it is; `former.rs`: whose it was;
//! - `deadline.rs`: what may take for ever.
//!
//! Invariants: what does not answer holds up no thread but one of its own, and requests of guests,
//! which wait for as long as it takes; an image that was taken away is never written again with the
//! same handle.
//!
//! Deliberately absent: what a guest asks for and is told; that is the domain's.

mod deadline;
mod fate;
mod former;
mod handle;
mod image;
mod library;
mod lock;
mod settings;
mod spec;

use domain_abi::{DomainError, Params};
use domain_host::{HostImage, ImageOpener};
use image::Image;
pub use image::close_all;
use spec::Spec;
use std::sync::Arc;
use std::time::Duration;

/// What Ceph's images are asked for as.
pub const ENGINE: &str = "rbd";

struct Opener;

/// What opens images.
#[must_use]
pub fn opener() -> Arc<dyn ImageOpener> {
    Arc::new(Opener)
}

impl ImageOpener for Opener {
    fn open(
        &self,
        engine: &str,
        params: &Params,
        patience: Duration,
    ) -> Result<Arc<dyn HostImage>, DomainError> {
        if engine != ENGINE {
            return Err(DomainError::new(format!(
                "this host opens no images through `{engine}`, only through `{ENGINE}`"
            )));
        }
        Ok(Arc::new(Image::open(&Spec::parse(params)?, patience)?))
    }
}
