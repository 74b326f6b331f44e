//! A disk that is an image in a Ceph cluster (RBD).
//!
//! The image is the host's: it is open, with its lock, for as long as any instance has it, and an
//! upgrade takes it along as it is. So nothing of Ceph is in this module, and what is here is
//! policy: which image, what the guest is told of it (`announced.rs`), what each request maps to
//! and what becomes of errors (`disk.rs`), and where requests are meanwhile (`port.rs`). What is in
//! flight is the engine's (`domain_io::engine`).
//!
//! The host keeps no cache: what was written is with the OSDs when it is answered.

#![forbid(unsafe_code)]

mod announced;
mod disk;
mod port;

use announced::Announced;
use disk::Disk;
use domain_api::{
    Batch, BlockDomain, Capabilities, Claim, Completions, DeviceInfo, DomainError, Host, Image,
    Params, QueueContext, Swap,
};
use domain_io::engine::{Engine, Queue};
use std::time::Duration;

/// The host's name for what opens images.
const ENGINE: &str = "rbd";
/// How long a session's messages wait for the lock: it takes some 20 ms where nothing has it.
const TO_CLAIM: Duration = Duration::from_millis(200);
/// How long the start waits for it: that of a daemon which was killed is broken first.
const TO_CLAIM_AT_START: Duration = Duration::from_secs(10);

/// The disk in a cluster.
#[derive(Debug)]
pub struct RbdDisk {
    host: Host,
    engine: Engine<Disk>,
    image: Image,
    serial: String,
    name: String,
    way: String,
    announced: Announced,
}

impl BlockDomain for RbdDisk {
    const NAME: &'static str = "rbd";
    const VERSION: &'static str = "1.0.0";
    const SCHEMA_NAME: &'static str = "rbd";
    const SCHEMA: u32 = 1;
    const ACCEPTED_SCHEMAS: &'static [u32] = &[1];
    const PARAMS: &'static [&'static str] =
        &["image", "conf", "id", "namespace", "readonly", "locking", "serial"];
    const INHERITED: &'static [&'static str] = Self::PARAMS;

    type Queue = Queue<Disk>;

    fn prepare(host: Host, params: &Params) -> Result<Self, DomainError> {
        if params.get("image").is_none_or(str::is_empty) {
            return Err(DomainError::new(
                "parameter `image` is missing; name one with image=POOL/NAME, or a snapshot with image=POOL/NAME@SNAP",
            ));
        }
        let serial = params.serial()?;
        let read_only = params.flag("readonly", false)?;
        let is_late = match params.get("locking") {
            None | Some("true") => false,
            Some("late") => true,
            Some(other) => {
                return Err(DomainError::new(format!(
                    "parameter `locking` is `{other}`; it must be true or late"
                )));
            }
        };
        let mut wanted = Params::default();
        for (key, value) in params.iter().filter(|(key, _)| is_of_image(key)) {
            wanted.set(key, value);
        }
        wanted.set("readonly", read_only.to_string());
        let (name, way) = (announced::name(&wanted), announced::way(&wanted));
        announced::check_same(host, &name, &way)?;
        let image = host.open_image(ENGINE, &wanted)?;
        let found = image.info();
        let announced = match Announced::inherited(host) {
            Some(announced) => {
                announced.check(&name, &found)?;
                announced
            }
            None => {
                let announced = Announced::of(&found)?;
                // Later on rings wait for another program; the start does not.
                if !is_late && !claimed_at_start(image)? {
                    return Err(DomainError::new(format!(
                        "another program uses image {name} (`rbd status` shows which); end it, or give readonly=true, or locking=late for a guest that comes by migration"
                    )));
                }
                announced
            }
        };
        let engine = Engine::new(host, Disk::new(host, image, announced.read_only));
        Ok(Self { host, engine, image, serial, name, way, announced })
    }

    fn info(&self) -> DeviceInfo {
        let announced = self.announced();
        let can = if announced.read_only {
            Capabilities::READ_ONLY
        } else {
            Capabilities::DISCARD.with(Capabilities::WRITE_ZEROES).with(Capabilities::WRITE_CACHE)
        };
        DeviceInfo {
            capacity: announced.capacity,
            block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: announced.optimal_io_size,
            discard_granularity: announced.discard_granularity,
            capabilities: can.with(Capabilities::FLUSH),
            // All instances have the one handle, which keeps nothing back.
            swap: Swap::SameBacking,
            backing_kind: "rbd".to_owned(),
            backing_id: self.image.info().id,
            backing_cache: 0,
            serial: self.serial.clone(),
        }
    }

    fn activate(&self) -> Result<(), DomainError> {
        self.announced().keep(self.host, &self.name, &self.way)?;
        let storage = self.host.storage();
        if storage.schema() == Self::SCHEMA { Ok(()) } else { storage.set_schema(Self::SCHEMA) }
    }

    fn quiesce(&self) -> Result<(), DomainError> {
        // Nothing is in flight, and the image is the host's.
        Ok(())
    }

    fn resize(&self, capacity: u64) -> Result<(), DomainError> {
        if self.announced.read_only {
            return Err(DomainError::new("a disk that is only read stays as large as it is"));
        }
        self.image.resize(capacity)?;
        Announced { capacity, ..self.announced() }.keep(self.host, &self.name, &self.way)
    }

    fn claim(&self) -> Result<Claim, DomainError> {
        self.image.claim(TO_CLAIM)
    }

    fn release(&self) -> Result<(), DomainError> {
        self.image.release()
    }

    fn attach_queue(&self, context: QueueContext) -> Result<Queue<Disk>, DomainError> {
        Ok(self.engine.attach(context.queue))
    }

    fn detach_queue(&self, queue: Queue<Disk>) {
        self.engine.detach(queue);
    }

    fn submit(
        &self,
        queue: &mut Queue<Disk>,
        batch: &mut Batch<'_>,
        completions: &mut Completions<'_>,
    ) {
        self.engine.submit(queue, batch, completions);
    }

    fn reap(&self, queue: &mut Queue<Disk>, completions: &mut Completions<'_>) {
        self.engine.reap(queue, completions);
    }

    fn cancel(&self) {
        self.engine.cancel();
    }
}

impl RbdDisk {
    /// What the guest was told: what is in storage, once it is there.
    fn announced(&self) -> Announced {
        Announced::inherited(self.host).unwrap_or(self.announced)
    }
}

/// Claims the image for a disk that begins; whether it could.
fn claimed_at_start(image: Image) -> Result<bool, DomainError> {
    for _ in 0..10 {
        if image.claim(TO_CLAIM_AT_START)? != Claim::Taken {
            return Ok(true);
        }
        // A process that was killed a moment ago may take that long to be gone.
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(false)
}

/// Whether a parameter says which image it is, or how it is reached.
fn is_of_image(key: &str) -> bool {
    matches!(key, "image" | "conf" | "id" | "namespace")
}

domain_api::export_domain!(RbdDisk);
