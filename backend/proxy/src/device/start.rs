//! A device begins.

use super::{DomainProxy, Live};
use crate::change::prepare::Preparer;
use crate::record::code::Code;
use crate::record::report::{Phases, Refusal};
use domain_abi::Params;
use domain_host::{ImageOpener, ModuleLoader, QUEUE_LIMIT};
use std::sync::Arc;

impl DomainProxy {
    /// Starts a device of `queues` queues with the domain `name`, on a host that opens no images.
    ///
    /// # Errors
    /// Why the domain cannot be used.
    ///
    /// # Panics
    /// If `queues` is 0 or above [`QUEUE_LIMIT`]: the caller has checked its arguments.
    pub fn start(
        loader: Box<dyn ModuleLoader>,
        name: &str,
        params: Params,
        queues: usize,
    ) -> Result<Arc<Self>, Refusal> {
        Self::start_with(loader, None, name, params, queues)
    }

    /// Starts a device of `queues` queues with the domain `name`.
    ///
    /// # Errors
    /// Why the domain cannot be used.
    ///
    /// # Panics
    /// If `queues` is 0 or above [`QUEUE_LIMIT`]: the caller has checked its arguments.
    pub fn start_with(
        loader: Box<dyn ModuleLoader>,
        opener: Option<Arc<dyn ImageOpener>>,
        name: &str,
        params: Params,
        queues: usize,
    ) -> Result<Arc<Self>, Refusal> {
        assert!((1..=QUEUE_LIMIT).contains(&queues), "{queues} queues");
        let preparer = Preparer::new(loader, opener, queues);
        let first = preparer.prepare(name, params, None, || Ok(()), &mut Phases::default())?;
        preparer.storage.move_to(first.id);
        if let Err(error) = first.instance.activate() {
            let message = format!("`{}` was not activated: {error}", first.record().name);
            return Err(Refusal::new(Code::ActivateFailed, message));
        }
        first.instance.set_generation(1);
        let (record, live) = (first.record(), Live::Serving(Arc::clone(&first)));
        let proxy = Self::assemble(preparer, queues, Some(first), live, record, 1);
        proxy.settle_claim();
        Ok(proxy)
    }
}
