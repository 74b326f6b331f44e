//! What has become of an image.

use std::sync::OnceLock;

/// An image's name, and why it cannot be used any more, once that is so.
#[derive(Debug)]
pub(crate) struct Fate {
    /// For people.
    pub(crate) label: String,
    lost: OnceLock<String>,
}

impl Fate {
    pub(crate) const fn new(label: String) -> Self {
        Self { label, lost: OnceLock::new() }
    }

    pub(crate) fn lost(&self) -> Option<&String> {
        self.lost.get()
    }

    /// Something has failed: if because the cluster has locked this client out, that is the end.
    pub(crate) fn has_failed(&self, errno: i32) {
        if errno != libc::ESHUTDOWN {
            return;
        }
        let why = format!(
            "the lock of image {} was broken: this daemon was locked out of the cluster, and another program may use the image; nothing more is written. If it is to be this daemon's again, upgrade to the same domain",
            self.label
        );
        if self.lost.set(why).is_ok() {
            log::error!("{}", self.lost.get().map_or("", String::as_str));
        }
    }
}
