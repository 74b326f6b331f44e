//! An instance under test, with the host that it sees.

use super::lane::Lane;
use super::static_module::StaticModule;
use super::test_host::{TestHost, TestStorage};
use super::{DEADLINE, Violation};
use domain_api::{BlockDomain, Params, QueueIndex};
use domain_host::{CallError, HostServices, Instance, LoadedModule, Residency};
use std::sync::Arc;
use std::time::Duration;

/// An instance on the bench: its host, and how to get at its queues.
#[derive(Debug)]
pub struct Bench {
    /// What it sees of the host.
    pub host: Arc<TestHost>,
    /// The instance.
    pub instance: Arc<Instance>,
    /// Longest time that one of its requests may take.
    pub deadline: Duration,
}

impl Bench {
    /// Prepares an instance of `D` on `storage`.
    ///
    /// # Errors
    /// What the domain says.
    pub fn prepare<D: BlockDomain>(
        storage: &Arc<TestStorage>,
        params: &Params,
    ) -> Result<Self, CallError> {
        Self::of(StaticModule::of::<D>(), storage, params)
    }

    /// The same, of a module.
    pub(crate) fn of(
        module: Box<dyn LoadedModule>,
        storage: &Arc<TestStorage>,
        params: &Params,
    ) -> Result<Self, CallError> {
        let host = TestHost::new(storage);
        let services: Arc<dyn HostServices> = Arc::<TestHost>::clone(&host);
        let instance = Instance::prepare(module, services, params).map_err(|(error, _)| error)?;
        instance.set_generation(host.number);
        Ok(Self { host, instance: Arc::new(instance), deadline: DEADLINE })
    }

    /// Prepares an instance of `D` on `storage`, gives the storage to it, and activates it.
    ///
    /// # Errors
    /// What the domain says.
    pub fn activated<D: BlockDomain>(
        storage: &Arc<TestStorage>,
        params: &Params,
    ) -> Result<Self, CallError> {
        let bench = Self::prepare::<D>(storage, params)?;
        bench.activate()?;
        Ok(bench)
    }

    /// Gives the storage to it, and activates it.
    ///
    /// # Errors
    /// What the domain says.
    pub fn activate(&self) -> Result<(), CallError> {
        self.host.own_storage();
        self.instance.activate()
    }

    /// Attaches a queue, on this thread.
    ///
    /// # Errors
    /// What the domain says.
    pub fn lane(&self, queue: u32) -> Result<Lane, Violation> {
        Lane::attach(&self.host, &self.instance, QueueIndex(queue), self.deadline)
    }

    /// Ends the instance; nothing of it may be left. All its lanes must be gone.
    ///
    /// # Errors
    /// A lane that is left, a failing or panicking end, a thread that goes on, or storage used out
    /// of turn.
    pub fn retire(self) -> Result<(), Violation> {
        let Some(instance) = Arc::into_inner(self.instance) else {
            return Err(Violation::new("a queue is still attached"));
        };
        let retired = instance.retire();
        if let Err(error) = retired.destroyed {
            return Err(Violation::new(format!("its end failed: {error}")));
        }
        if let Residency::Resident(left) | Residency::Running(left) = retired.residency {
            return Err(Violation::new(format!("it does not go away: {}", left.reason())));
        }
        let left = Arc::strong_count(&self.host) - 1;
        if left != 0 {
            return Err(Violation::new(format!("{left} users of its host are left after its end")));
        }
        let trespasses = self.host.trespasses();
        if !trespasses.is_empty() {
            return Err(Violation::new(format!(
                "it used the storage while it was not its own: {}",
                trespasses.join(", ")
            )));
        }
        Ok(())
    }
}
