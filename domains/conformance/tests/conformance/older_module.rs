//! A host that is newer than a module does without what the module lacks.

use domain_abi::descriptor::Description;
use domain_abi::{ModuleVtable, Params};
use domain_api::{
    Batch, BlockDomain, Capabilities, Completions, DeviceInfo, DomainError, Exported, Host,
    QueueContext, Swap,
};
use domain_conformance::{StaticModule, TestHost, TestStorage};
use domain_host::{CallError, Identity, Instance, LoadedModule, Residency};

/// A disk that takes every new size.
struct Disk;

impl BlockDomain for Disk {
    const NAME: &'static str = "disk";
    const VERSION: &'static str = "1";
    const SCHEMA_NAME: &'static str = "disk";
    const SCHEMA: u32 = 1;
    const ACCEPTED_SCHEMAS: &'static [u32] = &[1];
    const PARAMS: &'static [&'static str] = &[];
    const INHERITED: &'static [&'static str] = &[];
    type Queue = ();

    fn prepare(_: Host, _: &Params) -> Result<Self, DomainError> {
        Ok(Self)
    }
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            capacity: 1 << 20,
            block_size: 512,
            physical_block_size: 512,
            optimal_io_size: 0,
            discard_granularity: 0,
            capabilities: Capabilities::default(),
            swap: Swap::No,
            backing_kind: "test".to_owned(),
            backing_id: (0, 0),
            backing_cache: 0,
            serial: String::new(),
        }
    }
    fn activate(&self) -> Result<(), DomainError> {
        Ok(())
    }
    fn quiesce(&self) -> Result<(), DomainError> {
        Ok(())
    }
    fn resize(&self, _: u64) -> Result<(), DomainError> {
        Ok(())
    }
    fn attach_queue(&self, _: QueueContext) -> Result<(), DomainError> {
        Ok(())
    }
    fn submit(&self, (): &mut (), _: &mut Batch<'_>, _: &mut Completions<'_>) {}
}

/// The disk, with a table of which it says that it ends after `size` bytes.
struct Cut {
    table: Box<ModuleVtable>,
    whole: Box<dyn LoadedModule>,
}

impl Cut {
    fn new(size: usize) -> Box<Self> {
        let mut table = Box::new(Exported::<Disk>::MODULE);
        table.size = size as u32;
        let rest = size_of::<ModuleVtable>().saturating_sub(size);
        let bytes: *mut u8 = (&raw mut *table).cast();
        // What a module of that age has there is anything.
        // SAFETY: inside the table, and nothing reads past its `size` (that is what is tested).
        unsafe { std::ptr::write_bytes(bytes.add(size), 0xa5, rest) };
        Box::new(Self { table, whole: StaticModule::of::<Disk>() })
    }
}

// SAFETY: the table is ours until we are dropped, and its functions are this program's.
unsafe impl LoadedModule for Cut {
    fn vtable(&self) -> *const ModuleVtable {
        &raw const *self.table
    }
    fn description(&self) -> &Description {
        self.whole.description()
    }
    fn identity(&self) -> &Identity {
        self.whole.identity()
    }
    fn unload(self: Box<Self>) -> Residency {
        Residency::Gone
    }
}

fn instance(size: usize) -> Result<Instance, CallError> {
    let host = TestHost::new(&TestStorage::new());
    Instance::prepare(Cut::new(size), host, &Params::default()).map_err(|(error, _)| error)
}

#[test]
fn a_module_that_is_older_than_resizing_says_that_it_cannot_be_resized() {
    let old = instance(ModuleVtable::FIRST_SIZE).unwrap();
    old.activate().unwrap();
    let Err(CallError::Failed(why)) = old.resize(2 << 20) else { panic!("it is resized") };
    assert!(why.contains("cannot be resized") && why.contains("upgrade"), "{why}");
    assert!(!old.is_dead() && old.info().is_ok(), "it goes on");
    assert_eq!(instance(size_of::<ModuleVtable>()).unwrap().resize(2 << 20), Ok(()));
    let error = instance(ModuleVtable::FIRST_SIZE - 8).unwrap_err().to_string();
    assert!(error.contains("bytes of ABI"), "{error}");
}
