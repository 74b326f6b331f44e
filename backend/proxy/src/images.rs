//! Images that are open for the device: one that an instance asks for is opened once, and its
//! successor gets the same.
//!
//! Invariants: an image is closed when no instance has it any more; one that is lost is not given
//! to another instance; while the device is given to another process, none is claimed here.

use crate::signal::lock;
use domain_abi::{Claim, DomainError, Params};
use domain_host::{HostImage, ImageOpener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// How long it may take to have back what another process was to have.
const TO_TAKE_BACK: Duration = Duration::from_secs(5);

/// One that was opened.
struct Opened {
    engine: String,
    params: Params,
    image: Weak<dyn HostImage>,
}

/// How long a server that goes on with a device waits for what does not answer: the guest waits for
/// that as well, and there is nothing else to be done.
const TO_GO_ON: Duration = Duration::from_secs(600);

/// The images of one device.
#[derive(Default)]
pub(crate) struct Images {
    opener: Option<Arc<dyn ImageOpener>>,
    /// The device is not this process's yet.
    is_patient: AtomicBool,
    opened: Mutex<Vec<Opened>>,
}

impl Images {
    pub(crate) fn new(opener: Option<Arc<dyn ImageOpener>>) -> Self {
        Self { opener, ..Self::default() }
    }

    /// Whether what does not answer is waited for until it does.
    pub(crate) fn be_patient(&self, is_patient: bool) {
        self.is_patient.store(is_patient, Ordering::Relaxed);
    }

    /// The image that is open, or a new one.
    pub(crate) fn open(
        &self,
        engine: &str,
        params: &Params,
    ) -> Result<Arc<dyn HostImage>, DomainError> {
        let is_it = |opened: &&Opened| opened.engine == engine && opened.params == *params;
        let opened = lock(&self.opened);
        let mut known = opened.iter().filter(is_it).filter_map(|it| it.image.upgrade());
        if let Some(image) = known.find(|image| image.lost().is_none()) {
            return Ok(image);
        }
        drop(known);
        drop(opened);
        let opener = self.opener.as_ref().ok_or_else(|| {
            DomainError::new(format!("this host opens no images through `{engine}`"))
        })?;
        // Without the lock: it may take seconds.
        let is_patient = self.is_patient.load(Ordering::Relaxed);
        let patience = if is_patient { TO_GO_ON } else { Duration::ZERO };
        let image = opener.open(engine, params, patience)?;
        let mut opened = lock(&self.opened);
        opened.retain(|it| it.image.strong_count() > 0);
        opened.push(Opened {
            engine: engine.to_owned(),
            params: params.clone(),
            image: Arc::downgrade(&image),
        });
        Ok(image)
    }

    fn all(&self) -> Vec<Arc<dyn HostImage>> {
        lock(&self.opened).iter().filter_map(|it| it.image.upgrade()).collect()
    }

    /// Those that can be used.
    fn well(&self) -> impl Iterator<Item = Arc<dyn HostImage>> + use<> {
        self.all().into_iter().filter(|image| image.lost().is_none())
    }

    /// Whether an instance has one that is lost. What it had claimed went with it, and one that was
    /// opened in its place is claimed by nothing.
    pub(crate) fn any_lost(&self) -> bool {
        self.all().iter().any(|image| image.lost().is_some())
    }

    /// The device goes to another process, which claims for itself.
    ///
    /// # Errors
    /// One cannot be given back.
    pub(crate) fn give_back(&self) -> Result<(), DomainError> {
        self.well().try_for_each(|image| image.release())
    }

    /// The device is this process's again, with rings that run.
    ///
    /// # Errors
    /// One cannot be had.
    pub(crate) fn take_back(&self) -> Result<(), DomainError> {
        for image in self.well() {
            if image.claim(TO_TAKE_BACK)? == Claim::Taken {
                return Err(DomainError::new("another program has taken its image meanwhile"));
            }
        }
        Ok(())
    }

    /// The process is about to end.
    pub(crate) fn close(&self) {
        self.all().iter().for_each(|image| image.close());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_conformance::MemoryImage;

    /// Keeps what it has opened, and how patiently.
    #[derive(Default)]
    struct Opener(Mutex<Vec<(Weak<MemoryImage>, Duration)>>);

    impl ImageOpener for Opener {
        fn open(
            &self,
            _: &str,
            _: &Params,
            patience: Duration,
        ) -> Result<Arc<dyn HostImage>, DomainError> {
            let image = MemoryImage::new(false);
            lock(&self.0).push((Arc::downgrade(&image), patience));
            Ok(image)
        }
    }

    fn images() -> (Arc<Opener>, Images) {
        let opener = Arc::<Opener>::default();
        (Arc::clone(&opener), Images::new(Some(opener)))
    }

    impl Opener {
        fn count(&self) -> usize {
            lock(&self.0).len()
        }

        fn last(&self) -> Arc<MemoryImage> {
            lock(&self.0).last().and_then(|(image, _)| image.upgrade()).expect("it is open")
        }
    }

    #[test]
    fn an_image_is_opened_once_until_it_is_lost_or_not_used() {
        let (opener, images) = images();
        let open = |pair: &str| images.open("e", &Params::from_pairs([pair]).unwrap()).unwrap();
        let first = open("image=a");
        assert!(Arc::ptr_eq(&first, &open("image=a")));
        let other = open("image=b");
        assert_eq!(opener.count(), 2);
        drop(other);
        let lost = open("image=b");
        assert_eq!(opener.count(), 3, "nothing had it any more");
        opener.last().is_lost.store(true, Ordering::Relaxed);
        assert!(images.any_lost());
        drop(open("image=b"));
        let another = open("image=b");
        assert!(another.lost().is_none() && opener.count() == 5);
        assert!(Arc::ptr_eq(&another, &open("image=b")), "the new one is the one");
        assert!(images.any_lost(), "one still has it");
        drop(lost);
        assert!(!images.any_lost());
        images.close();
        assert!(opener.last().is_closed.load(Ordering::Relaxed));
        let none = Images::new(None).open("rbd", &Params::default());
        assert!(none.is_err_and(|error| error.to_string().contains("`rbd`")));
    }

    #[test]
    fn claims_go_with_the_device_and_come_back_with_it() {
        let (opener, images) = images();
        let image = images.open("e", &Params::default()).unwrap();
        image.claim(Duration::ZERO).unwrap();
        images.give_back().unwrap();
        assert!(!opener.last().is_claimed.load(Ordering::Relaxed));
        images.take_back().unwrap();
        assert!(opener.last().is_claimed.load(Ordering::Relaxed));
        images.give_back().unwrap();
        opener.last().is_taken.store(true, Ordering::Relaxed);
        assert!(images.take_back().is_err(), "another has it");
    }

    #[test]
    fn what_is_lost_is_neither_given_back_nor_taken_back() {
        let (opener, images) = images();
        let _lost = images.open("e", &Params::default()).unwrap();
        let lost = opener.last();
        lost.is_taken.store(true, Ordering::Relaxed);
        lost.is_lost.store(true, Ordering::Relaxed);
        let _image = images.open("e", &Params::default()).unwrap();
        images.give_back().unwrap();
        images.take_back().unwrap();
        assert!(opener.last().is_claimed.load(Ordering::Relaxed));
        assert!(!lost.is_claimed.load(Ordering::Relaxed));
    }

    #[test]
    fn only_a_device_that_nothing_serves_has_patience() {
        let (opener, images) = images();
        let patience = |images: &Images| {
            drop(images.open("e", &Params::default()).unwrap());
            lock(&opener.0).last().unwrap().1
        };
        assert_eq!(patience(&images), Duration::ZERO);
        images.be_patient(true);
        assert_eq!(patience(&images), TO_GO_ON);
    }
}
